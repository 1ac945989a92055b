"""What each prompt knows of an image, as a heat map per LLM."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flame.report.figures import PALETTE, canvas
from flame.study import jobs, stages
from flame.study.schema.figures import FigureBlock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from flame.report.knowledge import Knowledge
    from flame.study.settings import FigureSettings, Probed
    from flame.study.study import Study

CELL = 0.36  # inches
MARGINS = 2.25, 2.9  # inches for labels: beside the panels, above and below them
DARK = 0.6  # share of the scale from which numbers are white
NOTE = (
    "A linear probe predicts an attribute of the image (column) from the stored embedding of its"
    " {kind} caption under one prompt (row).\nTop-1 accuracy in percent on held-out captions of"
    " {dataset} ({captions:,}, {folds} folds).  Orange: best prompt of its column, if its 95 %"
    " interval is above the mean of the others.\nDot: what the prompt asks for.  Most frequent"
    " class: without any embedding."
)


class Keys(FigureBlock):
    """Accuracy of linear probes by prompt and attribute, one panel per LLM."""

    kind: Literal["knowledge"]

    def mistakes(self, study: "Study") -> Iterator[tuple[str, str]]:
        """A study without probes."""
        if study.knowledge is None:
            yield "kind", "needs probes, but the study has no block `knowledge`"

    def inputs(self, study: "Study", results: Iterable[str]) -> list[str]:
        """The probes of every LLM."""
        return jobs.probes(study)

    def resolved(self, study: "Study") -> dict[str, Any]:
        """Names and labels."""
        return {"probed": stages.probed(study)}


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """Heat maps side by side, on one colour scale from 0 to 100 %.

    Args:
        inputs: JSON of the knowledge stage, one file per LLM.
        settings: the figure, with names and labels.
    """
    import matplotlib as mpl
    import seaborn as sns

    from flame.report import knowledge

    probed = settings.probed
    assert probed is not None
    known = knowledge.read(inputs, probed)
    block = probed.block
    captions = next(iter(known.values())).captions
    note = NOTE.format(
        kind=block.captions, dataset=block.dataset, captions=captions, folds=block.folds
    )
    across, down = len(known) * len(block.attributes), len(probed.facets) + 1
    figure = canvas(CELL * across + MARGINS[0], CELL * down + MARGINS[1], settings, note)
    panels = figure.subplots(1, len(known), squeeze=False)[0]
    colours = sns.color_palette("crest", as_cmap=True)
    for place, (axes, (label, found)) in enumerate(zip(panels, known.items(), strict=True)):
        _panel(axes, found, probed, colours)
        axes.set_title(label, fontweight="bold", parse_math=False)
        if place:
            axes.tick_params(labelleft=False)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 100), colours)
    bar = figure.colorbar(scale, ax=panels, pad=0.01, fraction=0.02, aspect=30)
    bar.set_label("top-1 accuracy, %")
    bar.outline.set_visible(False)
    return figure


def _panel(axes: "Axes", found: "Knowledge", probed: "Probed", colours: "Colormap") -> None:
    from flame.report.knowledge import words

    attributes, facets = probed.block.attributes, probed.facets
    rows = [[found.cells[facet, name].value for name in attributes] for facet in facets]
    rows.append([found.majority[name].value for name in attributes])
    # A half row of space before the most frequent class, and a little between levels.
    tops = _tops([about.level for about in facets.values()])
    for top, row in zip(tops, rows, strict=True):
        axes.pcolormesh(
            np.arange(len(row) + 1),
            [top, top + 1],
            [row],
            vmin=0,
            vmax=100,
            cmap=colours,
            edgecolors="white",
            linewidth=1,
        )
    names, best = list(attributes), {name: found.best(name) for name in attributes}
    for facet, top, row in zip([*facets, ""], tops, rows, strict=True):
        for column, (name, value) in enumerate(zip(names, row, strict=True)):
            is_best, asked = facet in best[name], probed.block.asks_for.get(facet) == name
            _mark(axes, column, top, value, is_best=is_best, asked=asked)
    axes.set_xlim(-0.05, len(names) + 0.05)
    axes.set_ylim(tops[-1] + 1.05, -0.05)
    axes.set_xticks(np.arange(len(names)) + 0.5, list(attributes.values()), rotation=90)
    axes.set_yticks([top + 0.5 for top in tops], [*map(words, facets), "most frequent class"])
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)


def _tops(levels: Sequence[str]) -> list[float]:
    """Upper edge of every row, and of the one after them."""
    tops = [0.0]
    for before, level in zip(levels, [*levels[1:], None], strict=True):
        gap = 0.35 if level is None else 0.15 if level != before else 0.0
        tops.append(tops[-1] + 1 + gap)
    return tops


def _mark(
    axes: "Axes", column: int, top: float, value: float, *, is_best: bool, asked: bool
) -> None:
    """The number of a cell, a frame if it is the best of its column, a dot if it is asked for."""
    from matplotlib.patches import Rectangle

    colour = "white" if value > 100 * DARK else "black"
    axes.text(
        column + 0.5,
        top + 0.53,
        f"{value:.0f}",
        ha="center",
        va="center",
        color=colour,
        fontsize=10,
        fontweight="bold" if is_best else "normal",
    )
    if is_best:
        edges = Rectangle((column, top), 1, 1, fill=False, edgecolor=PALETTE[1], lw=2.5, zorder=3)
        axes.add_patch(edges)
    if asked:
        axes.plot(column + 0.88, top + 0.12, marker="o", markersize=3.2, color=colour, zorder=4)
