"""Metrics against the number of prompts, for every draw of the prompts (Table 6 as curves)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from flame.report.figures import GREY, PALETTE, canvas, read
from flame.report.markdown import metric_name
from flame.report.results_table import column_name
from flame.study.schema.figures import FigureBlock
from flame.study.schema.tables import Column, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.report.results import Estimate
    from flame.study.settings import FigureSettings

SPREAD = 0.22  # horizontal offset between draws, in prompts, so that intervals do not overlap
WIDTH = 22  # characters per title line: panels are side by side
NOTE = (
    "Circles: single draws of the prompts, with 95 % intervals over queries. Line: mean over draws."
)


class Keys(FigureBlock):
    """Recall against the number of prompts, with intervals and several draws (Table 6)."""

    kind: Literal["prompts"]
    runs: dict[int, tuple[str, ...]] = Field(description="number of prompts -> runs, one per draw")
    columns: tuple[Column, ...] = Field(min_length=1, description="one panel per column")

    def uses(self) -> tuple[tuple[str, ...], tuple[Measure, ...]]:
        """Every draw, in the measures of every panel."""
        runs = tuple(run for draws in self.runs.values() for run in draws)
        return runs, tuple(m for column in self.columns for m in column.measures)


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """One panel per column; x is the number of prompts, y the metric in percent.

    Args:
        inputs: JSON and Parquet files of the evaluate stage.
        settings: the figure.
    """
    chosen = settings.figure
    assert isinstance(chosen, Keys)
    results = read(inputs, settings)
    rows = -(-len(chosen.columns) // 4)
    width = -(-len(chosen.columns) // rows)
    figure = canvas(max(2.9 * width, 6), 2.8 * rows + 1, settings, NOTE)
    grid = figure.subplots(rows, width, squeeze=False).flat
    for axes in grid[len(chosen.columns) :]:
        axes.remove()
    for axes, column in zip(grid, chosen.columns, strict=False):
        drawn = {
            number: [results.rate(run, column.measures) for run in runs]
            for number, runs in sorted(chosen.runs.items())
        }
        _panel(axes, drawn)
        axes.set_title(_title(column, settings), parse_math=False)
    lowest = grid[len(chosen.columns) - width : len(chosen.columns)]
    for axes in lowest:
        axes.set_xlabel("number of prompts")
    return figure


def _panel(axes: "Axes", drawn: "dict[int, list[Estimate]]") -> None:
    means = [fmean(e.value for e in estimates) for estimates in drawn.values()]
    axes.plot([*drawn], means, marker="D", markersize=4, color=PALETTE[0], linewidth=2)
    for number, estimates in drawn.items():
        for place, estimate in enumerate(estimates):
            axes.errorbar(
                number + SPREAD * (place - (len(estimates) - 1) / 2),
                estimate.value,
                [[estimate.value - estimate.low], [estimate.high - estimate.value]],
                fmt="o",
                markersize=5,
                markerfacecolor="white",
                color=GREY,
                linewidth=1,
                zorder=3,
            )
    axes.set_xticks([*drawn])
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _title(column: Column, settings: "FigureSettings") -> str:
    """What was measured, and the metric."""
    lines = wrap(column_name(column, settings), WIDTH, break_on_hyphens=False)
    return "\n".join([*lines, f"{metric_name(column.metric, spelled_out=True)}, %"])
