"""How much numbers vary with the seed, with drawn prompts and with the queries, as dots."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from flame.report.figures import GREY, PALETTE, canvas
from flame.report.markdown import metric_name
from flame.runtime.errors import known
from flame.study import files
from flame.study.schema.figures import FigureBlock

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.study.settings import FigureSettings

LINE = 0.23  # inches for one number
NOTHING = "No run of this study was trained several times."
NOTE = (
    "Colours: standard deviation between trainings with other seeds, what drawn prompts add to it,"
    " standard error over the queries.\nGrey: smallest difference between two runs that would be"
    " found with a probability of 80 %, with 1 and with 3 trainings of each."
)
# column of the CSV -> label, marker, colour
MARKS = {
    "found_1": ("found with 1 training", "|", GREY),
    "found_3": ("found with 3 trainings", "D", "0.65"),
    "queries": ("queries", "^", PALETTE[2]),
    "draws": ("draws of prompts", "s", PALETTE[1]),
    "seeds": ("seeds", "o", PALETTE[0]),
}


class Keys(FigureBlock):
    """Standard deviations of the numbers of some tables, one panel per method."""

    kind: Literal["variance"]
    tables: tuple[str, ...] = Field(min_length=1, description="whose columns are shown")

    def mistakes(self, study: Any) -> Iterator[tuple[str, str]]:
        """A table that the study does not have."""
        for name in self.tables:
            if name not in study.tables:
                yield "tables", f"unknown table {known(name, study.tables)}"

    def inputs(self, study: Any, results: Iterable[str]) -> list[str]:
        """The list of variances."""
        return [files.output("variance")]


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """One line per number, one panel per method; standard deviations in points.

    Args:
        inputs: CSV of variances.
        settings: the figure.
    """
    import polars as pl

    chosen = settings.figure
    assert isinstance(chosen, Keys)
    frame = pl.read_csv(inputs[0], infer_schema_length=None)
    shown = [any(t in chosen.tables for t in (x or "").split()) for x in frame["tables"]]
    frame = frame.filter(pl.Series(shown, dtype=pl.Boolean))
    if frame.is_empty():
        figure = canvas(7, 1.6, settings)
        figure.text(0.5, 0.4, NOTHING, ha="center", color=GREY)
        return figure
    label = pl.struct("measured", "metric").map_elements(_label, return_dtype=pl.String)
    frame = frame.with_columns(label.alias("label"))
    lines = frame["label"].unique(maintain_order=True).to_list()
    methods = frame["method"].unique(maintain_order=True).to_list()
    figure = canvas(6.2 + 2.8 * len(methods), LINE * len(lines) + 2.2, settings, NOTE)
    grid = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)[0]
    for axes, method in zip(grid, methods, strict=True):
        rows = frame.filter(pl.col("method") == method)
        _panel(axes, rows, lines)
        trainings = max(rows["trainings"].to_list())
        axes.set_title(f"{method} (up to {trainings} trainings)", parse_math=False)
        axes.set_xlabel("points")
    highest = frame.select(pl.max_horizontal(*MARKS).max()).item()
    grid[0].set_xlim(0, ceil(highest * 1.04))
    grid[0].set_ylim(len(lines) - 0.4, -0.6)
    grid[0].set_yticks(range(len(lines)), lines)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    return figure


def _label(row: dict[str, str]) -> str:
    return f"{row['measured']}, {metric_name(row['metric'])}"


def _panel(axes: "Axes", rows: "pl.DataFrame", lines: Sequence[str]) -> None:
    places = [lines.index(label) for label in rows["label"]]
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    spans = [
        (place, *ends)
        for place, *ends in zip(places, rows["found_3"], rows["found_1"], strict=True)
        if None not in ends
    ]
    for place, *ends in spans:
        axes.plot(ends, [place, place], color="0.8", linewidth=1.5, zorder=1)
    for column, (label, marker, color) in MARKS.items():
        values = [float("nan") if value is None else value for value in rows[column]]
        axes.plot(
            values, places, marker, color=color, label=label, markersize=6, clip_on=False, zorder=3
        )
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
