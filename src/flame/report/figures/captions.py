"""Captions of the same images by two captioners: their lengths, their words, their embeddings."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from flame.embedding.store import Embeddings, by_kind
from flame.evaluation.features import directions
from flame.report.figures import LINES, PALETTE, canvas, dataset_folder
from flame.report.figures.examples import evenly
from flame.study.schema.figures import CaptionsFigure
from flame.study.settings import FigureSettings

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
LARGEST = 5000  # images, of which every two captions are compared
ROWS = 512  # of a store, read at a time
BINS = 40
TAILS = (0.001, 0.999)  # quantiles from which a histogram begins and ends
NARROWEST = 1e-3  # cosines that a histogram spans at least
NOTE = (
    "{count} images; embeddings of {llm}, of a caption the mean over its prompt's default facets."
    " In common: distinct words that both use.\nKnown: how much of a text is words that the other"
    " one uses, too. Other images: captions of two that stand half of the set apart.\nNearest: how"
    " often, of all captions ({second}), that of the same image is the nearest to one ({first})."
)


class Captions(NamedTuple):
    """Captions of one kind by one captioner, one for each of N images.

    Args:
        texts: N texts.
        features: (N, d) float32, unit norm.
    """

    texts: list[str]
    features: torch.Tensor


class Similarity(NamedTuple):
    """How near two captioners' captions are to each other, as cosines of their embeddings.

    Args:
        same: (N,) of the two captions of an image.
        other: (N,) of captions of two images.
        nearest: share of the first captioner's captions to which, of all of the second's, that of
            the same image is the nearest.
    """

    same: np.ndarray
    other: np.ndarray
    nearest: float


def draw(inputs: Sequence[Path], settings: FigureSettings) -> Figure:
    """One row a caption kind; panels of words a caption, vocabulary, similarity.

    Args:
        inputs: a folder of captions for each data set, and the stores of the LLM.
        settings: of a `CaptionsFigure`, with the facets that are averaged.
    """
    chosen = settings.figure
    assert isinstance(chosen, CaptionsFigure)
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


def matched(
    folders: Sequence[Path], stores: Sequence[Path], kind: str, facets: Sequence[str]
) -> tuple[Captions, Captions]:
    """Captions of the images that both data sets have, at most `LARGEST` at even distances.

    Args:
        folders: of the two data sets, each with `captions.parquet`.
        stores: parts of the stores of this kind, each with one of the data sets or both.
        kind: of the captions; the first of an image counts.
        facets: those whose vectors are averaged.

    Raises:
        ValueError: fewer than two images in common.
    """
    tables, embeddings = [], []
    for folder in folders:
        parts = [part for part in stores if (part / folder.name).is_dir()]
        opened = Embeddings.open(parts, folder.name)
        texts = pl.scan_parquet(folder / "captions.parquet").filter(kind=kind)
        rows = pl.LazyFrame({"key": opened.keys}).with_row_index("row")
        tables.append(
            texts.select("key", "text")
            .unique("key", keep="first", maintain_order=True)
            .join(rows.unique("key", keep="first"), on="key", maintain_order="left")
        )
        embeddings.append(opened)
    common = tables[0].join(tables[1], on="key", maintain_order="left").collect()
    if len(common) < 2:
        names = " and ".join(repr(folder.name) for folder in folders)
        raise ValueError(
            f"{len(common)} images have {kind} captions in {names}: nothing to compare"
        )
    common = common[evenly(len(common), LARGEST)]
    first, second = (
        Captions(common[text].to_list(), _features(opened, common[row].to_numpy(), facets))
        for opened, text, row in zip(
            embeddings, ("text", "text_right"), ("row", "row_right"), strict=True
        )
    )
    return first, second


def _features(embeddings: Embeddings, rows: np.ndarray, facets: Sequence[str]) -> torch.Tensor:
    """Directions (N, d) of some rows, read in blocks: all facets of all of them are much memory."""
    blocks = (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))
    read = (torch.from_numpy(embeddings.rows(block, facets)) for block in blocks)
    return torch.cat([directions(vectors, facets, {}) for vectors in read])


def words_of(texts: Iterable[str]) -> list[list[str]]:
    """Words of each text in lower case; what an apostrophe or a hyphen joins is one."""
    return [WORD.findall(text.lower()) for text in texts]


def growth(words: Iterable[Sequence[str]]) -> tuple[list[int], list[int]]:
    """Words read, and distinct ones among them, after each caption."""
    read, distinct = [0], [0]
    seen: set[str] = set()
    for caption in words:
        seen.update(caption)
        read.append(read[-1] + len(caption))
        distinct.append(len(seen))
    return read, distinct


def shared(
    first: Iterable[Sequence[str]], second: Iterable[Sequence[str]]
) -> tuple[float, float, float]:
    """What two captioners' words have in common, as shares.

    Returns:
        Of all distinct words those that both use; of the words that the first one writes those
        that the second one uses, too; the same the other way round.
    """
    written = [[word for caption in words for word in caption] for words in (first, second)]
    one, two = map(set, written)
    of_first, of_second = (
        sum(word in other for word in words) / max(len(words), 1)
        for words, other in zip(written, (two, one), strict=True)
    )
    return len(one & two) / max(len(one | two), 1), of_first, of_second


def similarity(first: torch.Tensor, second: torch.Tensor) -> Similarity:
    """Cosines of the captions of two captioners.

    Args:
        first: (N, d), unit norm.
        second: (N, d), unit norm, of the same images.
    """
    cosines = first @ second.T
    same = cosines.diagonal()
    other = (first * second.roll(len(second) // 2, dims=0)).sum(dim=1)
    # Where two are equally near, as captions of the same words are, none is the nearer.
    nearest = (same >= cosines.max(dim=1).values).float().mean()
    return Similarity(same.numpy(), other.numpy(), float(nearest))


def _lengths(axes: Axes, words: dict[str, list[list[str]]], kind: str) -> None:
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


def _vocabulary(axes: Axes, words: dict[str, list[list[str]]], kind: str) -> None:
    both, *known = shared(*words.values())
    for place, ((label, found), share) in enumerate(zip(words.items(), known, strict=True)):
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


def _similarity(axes: Axes, found: Similarity, labels: Sequence[str], kind: str) -> None:
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


def _steps(axes: Axes, values: np.ndarray, edges: np.ndarray, place: int, label: str) -> None:
    """Share of the values in each bin, in percent; the few beyond the last bins are put there."""
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


def _head(axes: Axes, title: str) -> None:
    """Title and legend above a panel, where they hide nothing of it."""
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
