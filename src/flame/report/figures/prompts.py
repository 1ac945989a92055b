"""Metrics against the number of prompts, ours above the paper's (Table 6 as curves)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from flame.report.figures import GREY, PALETTE, canvas, read
from flame.report.markdown import metric_name
from flame.report.results_table import column_name
from flame.runtime.errors import known
from flame.study import files
from flame.study.schema.figures import FigureBlock
from flame.study.schema.tables import Column, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.report.results import Estimate
    from flame.study.settings import FigureSettings

MOST = 4  # panels side by side
OFFSET = 0.25  # of the marks of single trainings from their mean, in prompts
STEP = 5  # points; all panels span a multiple of it
WIDTH = 24  # characters per title line: panels are side by side
NOTE = (
    "Blue: mean over the trainings of a run, with a 95 % interval over queries{and_trainings}."
    " Circles: single trainings{drawn}.\n"
)
PAPER = "Orange: the paper's numbers, on its own benchmarks. "
CUT = "The vertical axes do not start at 0: all show a range of {span} points."


class Keys(FigureBlock):
    """Recall against the number of prompts, with intervals and single trainings (Table 6)."""

    kind: Literal["prompts"]
    runs: dict[int, str] = Field(min_length=1, description="number of prompts -> run")
    columns: tuple[Column, ...] = Field(min_length=1, description="one panel per column")
    table: str | None = Field(
        default=None,
        description="table with the paper's numbers of these columns; its rows are numbers of "
        "prompts; null: no curve of the paper",
    )

    def uses(self) -> tuple[tuple[str, ...], tuple[Measure, ...]]:
        """Every run, in the measures of every panel."""
        measures = (m for column in self.columns for m in column.measures)
        return tuple(self.runs.values()), tuple(measures)

    def mistakes(self, study: Any) -> Iterator[tuple[str, str]]:
        """A table that the study does not have."""
        if self.table is not None and self.table not in study.tables:
            yield "table", f"unknown table {known(self.table, study.tables)}"

    def inputs(self, study: Any, results: Iterable[str]) -> list[str]:
        """Metrics and hits, and the table."""
        table = [files.output("table", table=self.table)] if self.table else []
        return [*super().inputs(study, results), *table]


class _Panel(NamedTuple):
    """What one column shows."""

    column: Column
    runs: "dict[int, tuple[Estimate, list[float]]]"
    """Number of prompts -> mean, and value of every training."""
    paper: dict[int, float]
    """Number of prompts -> value."""

    def extent(self, ours: bool) -> tuple[float, float]:
        """Lowest and highest value."""
        values = list(self.paper.values())
        if ours:
            estimates = [estimate for estimate, _ in self.runs.values()]
            values = [v for e in estimates for v in (e.low, e.high)]
            values += [v for _, single in self.runs.values() for v in single]
        return min(values), max(values)


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """One panel per column, and below it the paper's; x is the number of prompts, y in percent.

    Args:
        inputs: JSON and Parquet files of the evaluate stage, and the CSV of the table.
        settings: the figure.
    """
    panels = _panels(inputs, settings)
    kinds = [True, False] if any(panel.paper for panel in panels) else [True]
    width = min(len(panels), MOST)
    blocks = [panels[start : start + width] for start in range(0, len(panels), width)]
    shown = [(p, ours) for p in panels for ours in kinds if ours or p.paper]
    span = max(high - low for low, high in (panel.extent(ours) for panel, ours in shown))
    span = STEP * ceil((span + 1) / STEP)
    height = (2.9 if len(kinds) == 1 else 4.3) * len(blocks) + 1
    figure = canvas(max(2.9 * width, 6), height, settings, _note(panels, settings, span))
    grid = figure.subplots(len(blocks) * len(kinds), width, squeeze=False, sharex=True)
    for axes in grid.flat:
        axes.axis("off")
    for number, block in enumerate(blocks):
        for place, panel in enumerate(block):
            for row, ours in enumerate(kinds):
                if ours or panel.paper:
                    axes = grid[number * len(kinds) + row][place]
                    _draw(axes, panel, ours, span)
            grid[number * len(kinds)][place].set_title(
                _title(panel.column, settings), parse_math=False
            )
            axes.set_xlabel("number of prompts")
        if len(kinds) == 2:
            for row, label in enumerate((f"{settings.study} study", "paper")):
                grid[number * 2 + row][0].set_ylabel(label)
    return figure


def _panels(inputs: Sequence[Path], settings: "FigureSettings") -> list[_Panel]:
    chosen = settings.figure
    assert isinstance(chosen, Keys)
    results = read(inputs, settings)
    table = next((path for path in inputs if path.suffix == ".csv"), None)
    printed = _paper(table) if table else {}
    panels = []
    for column in chosen.columns:
        runs = {
            number: (
                results.rate(run, column.measures),
                results.values(run, column.measures),
            )
            for number, run in sorted(chosen.runs.items())
        }
        paper = {n: _printed(printed, n, column) for n in runs}
        panels.append(_Panel(column, runs, {n: v for n, v in paper.items() if v is not None}))
    return panels


def _paper(table: Path) -> "dict[int, dict[str, float]]":
    """Number of prompts -> column -> number of the paper."""
    import polars as pl

    frame: pl.DataFrame = pl.read_csv(table, infer_schema_length=None)
    names = [name for name in frame.columns if name.endswith(" paper")]
    return {int(row[frame.columns[0]]): {n: row[n] for n in names} for row in frame.to_dicts()}


def _printed(
    printed: Mapping[int, Mapping[str, float]], number: int, column: Column
) -> float | None:
    """The paper's value of a column: printed, or the mean of what it averages."""
    row = printed.get(number, {})
    own = row.get(f"{column.benchmark} {column.metric} paper")
    members = [row.get(f"{m.benchmark} {m.metric} paper") for m in column.measures]
    if own is not None:
        return own
    values = [value for value in members if value is not None]
    return fmean(values) if len(values) == len(members) else None


def _draw(axes: "Axes", panel: _Panel, ours: bool, span: float) -> None:
    axes.axis("on")
    numbers = [*panel.runs] if ours else [*panel.paper]
    if ours:
        values = [estimate.value for estimate, _ in panel.runs.values()]
        below = [e.value - e.low for e, _ in panel.runs.values()]
        above = [e.high - e.value for e, _ in panel.runs.values()]
        axes.errorbar(
            numbers,
            values,
            [below, above],
            marker="D",
            markersize=5,
            color=PALETTE[0],
            linewidth=2,
            elinewidth=1.5,
            capsize=3,
        )
        for number, (_, single) in panel.runs.items():
            if len(single) > 1:
                at = [number + OFFSET] * len(single)
                axes.plot(at, single, "o", markersize=4.5, markerfacecolor="none", color=GREY)
    else:
        axes.plot(numbers, [*panel.paper.values()], "s--", color=PALETTE[1], linewidth=2)
    low, high = panel.extent(ours)
    bottom = min(max((low + high - span) / 2, 0), 100 - span) if span < 100 else 0
    axes.set_ylim(bottom, bottom + span)
    axes.set_xticks([*panel.runs])
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _note(panels: Sequence[_Panel], settings: "FigureSettings", span: float) -> str:
    estimates = [estimate for panel in panels for estimate, _ in panel.runs.values()]
    covered = all(estimate.trainings for estimate in estimates)
    drawn = any(run.drawn for run in settings.runs.values())
    note = NOTE.format(
        and_trainings=" and trainings" if covered else " only",
        drawn=", each with other prompts where they are drawn" if drawn else "",
    )
    paper = PAPER if any(panel.paper for panel in panels) else ""
    return note + paper + CUT.format(span=span)


def _title(column: Column, settings: "FigureSettings") -> str:
    """What was measured, and the metric."""
    # A stand-in above what it stands for.
    parts = column_name(column, settings).replace(" (for ", "\n(for ").splitlines()
    lines = [line for part in parts for line in wrap(part, WIDTH, break_on_hyphens=False)]
    return "\n".join([*lines, f"{metric_name(column.metric, spelled_out=True)}, %"])
