"""Captions of the same images by two captioners: lengths, vocabulary, embeddings."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from flame.report.figures import LINES, PALETTE, canvas, dataset_folder
from flame.runtime.errors import known
from flame.study import jobs
from flame.study.schema.figures import FigureBlock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.report.captions import Similarity
    from flame.study.settings import FigureSettings
    from flame.study.study import Study

BINS = 40
TAILS = (0.001, 0.999)  # quantiles from which a histogram begins and ends
NARROWEST = 1e-3  # cosines that a histogram spans at least
NOTE = (
    "{count} images; embeddings by {llm}, averaged over the default facets of the prompt."
    " In common: distinct words that both use. Known: share of the text in words that the other"
    " one uses, too. Other images: captions of two images half a set apart. Nearest: how often the"
    " caption ({second}) nearest to a caption ({first}) is that of the same image."
)


class Keys(FigureBlock):
    """Two data sets with the same images, captioned twice."""

    kind: Literal["captions"]
    datasets: dict[str, str] = Field(
        min_length=2,
        max_length=2,
        description="label -> data set",
    )
    kinds: tuple[str, ...] = Field(
        min_length=1, description="caption kinds, one row of panels per kind"
    )
    llm: str = Field(description="LLM whose embeddings are compared")

    def stores(self) -> tuple[tuple[str, str, str], ...]:
        """Embeddings of both data sets, for every kind."""
        sets = self.datasets.values()
        return tuple((self.llm, dataset, kind) for kind in self.kinds for dataset in sets)

    def mistakes(self, study: "Study") -> Iterator[tuple[str, str]]:
        """Unknown names, and data sets with different images."""
        if self.llm not in study.llms:
            yield "llm", f"unknown llm {known(self.llm, study.llms)}"
        for kind in self.kinds:
            if kind not in study.prompt_names:
                kinds = known(kind, study.prompt_names)
                yield "kinds", f"no prompt embeds captions of kind {kinds}"
        unknown = [name for name in self.datasets.values() if name not in study.datasets]
        for name in unknown:
            yield "datasets", f"unknown dataset {known(name, study.datasets)}"
        sets = [study.datasets[name] for name in self.datasets.values() if name not in unknown]
        # Equal keys do not mean equal images: 000000000 is the first of every split.
        if len({(d.source, str(d.options.get("split"))) for d in sets}) > 1:
            first, second = self.datasets.values()
            yield "datasets", f"{first!r} and {second!r} are not of one source and split"

    def inputs(self, study: "Study", results: Iterable[str]) -> list[str]:
        """A folder of captions per data set, and the stores."""
        folders = []
        for dataset in self.datasets.values():
            # A captioner's folder has the data set's own captions, too.
            written = [kind for kind in self.kinds if study.captioner_of(dataset, kind)]
            folders.append(jobs.captions_of(study, dataset, (written or self.kinds)[0]))
        bundles = dict.fromkeys(map(study.bundle, self.datasets.values()))
        pairs = [(bundle, kind) for kind in self.kinds for bundle in bundles]
        found = [jobs.stores(study, self.llm, bundle, [kind]) for bundle, kind in pairs]
        return folders + [path for paths in found for path in paths]

    def resolved(self, study: "Study") -> dict[str, Any]:
        """Facets to average."""
        return {"averaged": {kind: study.prompt_of(kind).default for kind in self.kinds}}


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """One row per caption kind, with panels of length, vocabulary and similarity.

    Args:
        inputs: a folder of captions per data set, and the stores of the LLM.
        settings: the figure, with the facets that are averaged.
    """
    from flame.embedding.store import by_kind
    from flame.report.captions import matched, similarity, words_of

    chosen = settings.figure
    assert isinstance(chosen, Keys)
    stores = by_kind([path for path in inputs if path.suffix == ".zarr"])
    rows = {
        kind: matched(
            [dataset_folder(inputs, dataset) for dataset in chosen.datasets.values()],
            stores[kind],
            kind,
            settings.averaged[kind],
        )
        for kind in chosen.kinds
    }
    counts = sorted({len(first.texts) for first, _ in rows.values()})
    count = " or ".join(f"{number:,}" for number in counts)
    names = dict(zip(("first", "second"), chosen.datasets, strict=True))
    note = NOTE.format(count=count, llm=chosen.llm, **names)
    figure = canvas(13.5, 4.1 * len(rows) + 1.1, settings, note)
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for line, (kind, pair) in zip(grid, rows.items(), strict=True):
        labels = [*chosen.datasets]
        words = {
            label: words_of(captions.texts) for label, captions in zip(labels, pair, strict=True)
        }
        _lengths(line[0], words, kind)
        _vocabulary(line[1], words, kind)
        _similarity(line[2], similarity(*(captions.features for captions in pair)), labels, kind)
        for axes in line:
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _lengths(axes: "Axes", words: dict[str, list[list[str]]], kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = {label: np.array([*map(len, found)]) for label, found in words.items()}
    every = np.concatenate([*counts.values()])
    low, high = (int(np.quantile(every, share)) for share in TAILS)
    step = max(1, round((high - low) / BINS))
    edges = np.arange(low, high + step + 1, step) - 0.5
    for place, (label, each) in enumerate(counts.items()):
        _steps(axes, each, edges, place, f"{label}: median {np.median(each):.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("captions, %")
    _head(axes, f"Length of {kind} captions")


def _vocabulary(axes: "Axes", words: dict[str, list[list[str]]], kind: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    from flame.report.captions import growth, shared

    both, *in_other = shared(*words.values())
    for place, ((label, found), share) in enumerate(zip(words.items(), in_other, strict=True)):
        read, distinct = growth(found)
        axes.plot(
            read,
            distinct,
            color=PALETTE[place],
            linestyle=LINES[place],
            linewidth=2,
            label=f"{label}: {distinct[-1]:,} words, {100 * share:.1f} % known",
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("words read")
    axes.set_ylabel("distinct words")
    _head(axes, f"Vocabulary of {kind} captions: {100 * both:.0f} % in common")


def _similarity(axes: "Axes", found: "Similarity", labels: Sequence[str], kind: str) -> None:
    every = np.concatenate([found.same, found.other])
    low, high = float(np.quantile(every, TAILS[0])), float(every.max())
    edges = np.linspace(min(low, high - NARROWEST), high, BINS + 1)
    names = {
        f"same image: median {{:.3f}}, nearest in {100 * found.nearest:.1f} %": found.same,
        "other images: median {:.3f}": found.other,
    }
    for place, (name, each) in enumerate(names.items(), start=len(labels)):
        _steps(axes, each, edges, place, name.format(np.median(each)))
    axes.set_xlabel(f"cosine, {labels[0]} to {labels[1]}")
    axes.set_ylabel("pairs of captions, %")
    _head(axes, f"Similarity of {kind} captions")


def _steps(axes: "Axes", values: np.ndarray, edges: np.ndarray, place: int, label: str) -> None:
    """Share of the values in each bin, in percent; the last bins include the values beyond."""
    centers = (edges[1:] + edges[:-1]) / 2
    counts, _ = np.histogram(np.clip(values, centers[0], centers[-1]), edges)
    shares, colour = 100 * counts / len(values), PALETTE[place]
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.2)
    outline = [0, *np.repeat(shares, 2), 0]
    axes.plot(
        np.repeat(edges, 2), outline, color=colour, linestyle=LINES[place], linewidth=2, label=label
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)


def _head(axes: "Axes", title: str) -> None:
    """Title and legend above a panel, so that they hide nothing."""
    axes.legend(
        title=title,
        title_fontproperties={"weight": "bold", "size": "small"},
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(-0.08, 1),
        borderaxespad=0.2,
        frameon=False,
        fontsize="small",
    )
