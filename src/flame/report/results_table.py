"""A filled table of the paper -> CSV and Markdown."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import polars as pl

from flame.report.markdown import markdown_table, metric_name
from flame.report.reported import matching, number
from flame.report.results import Estimate, Results
from flame.study.schema.tables import Column, Row, Table
from flame.study.settings import TableSettings

MEASURED = """\
Measured in the *{study}* study, in percent. In italics, under each benchmark of the paper, the data
set that was measured for it: where it is another one, it stands in for the benchmark.
"""
INTERVALS = """\
Under each measured number, in small print, the 95 % bootstrap interval over the queries.
"""
SEEDS = """\
Where a run was trained with several seeds: their mean ± standard deviation.
"""
GAINS = """\
In parentheses, the gain over the same tower trained as CLIP; with a paired interval where measured.
"""
PAPER = """\
Lines marked "paper" or "reported" are numbers that the paper prints, on the benchmarks themselves;
nothing was measured for a line marked "reported". Where another data set stands in, the sizes of
measured and printed numbers are not comparable, only how a column runs from row to row.
"""
BEST = """\
Bold: the best of a column, among the measured and among the printed numbers.
"""


class Cell(NamedTuple):
    """A row in a column."""

    measured: Estimate | None
    paper: float | None
    """In percent, as the paper prints it."""
    gain: Estimate | None = None
    paper_gain: float | None = None
    """In points."""


def fill(results: Results, printed: pl.DataFrame, table: Table) -> list[list[Cell]]:
    """Cells of a table, row by row.

    Args:
        results: of the runs.
        printed: the table's numbers in the paper.
        table: rows and columns.
    """
    return [[cell(results, printed, table, row, c) for c in table.columns] for row in table.rows]


def cell(results: Results, printed: pl.DataFrame, table: Table, row: Row, column: Column) -> Cell:
    """What was measured, and what the paper reports, for a row in a column.

    Args:
        results: of the runs.
        printed: the table's numbers in the paper; a benchmark that none of them is of has none.
        table: where they are from.
        row: its run, and which of the numbers belong to it.
        column: benchmarks and metric.
    """
    measured, gain, paper, paper_gain = None, None, None, None
    if row.run is not None:
        measured = results.rate(row.run, column.measures)
        if row.gain_over is not None:
            gain = results.difference(row.run, row.gain_over, column.measures)
    name = column.printed
    if row.reported is not None and name.benchmark in printed["benchmark"]:
        wanted = {**row.reported, **name.model_dump()}
        paper = number(printed, table.reported.file, wanted)
        gains = wanted | {"metric": f"{name.metric}_gain_over_clip"}
        # Table 7 prints a gain of visual backbones, and none of LLMs.
        if row.gain_over and not matching(printed, table.reported.file, gains).is_empty():
            paper_gain = number(printed, table.reported.file, gains)
    return Cell(measured, paper, gain, paper_gain)


def as_csv(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """One line per row and one column per number, which are rounded to one decimal."""
    table = settings.table
    columns: dict[str, Sequence] = {table.row_header: [row.label for row in table.rows]}
    several = any(len(names) > 1 for names in settings.runs.values())
    gains = any(row.gain_over for row in table.rows)
    for column, column_cells in zip(table.columns, zip(*cells, strict=True), strict=True):
        name = f"{column.benchmark} {column.metric}"
        measured_on = "+".join(_datasets(column, settings))
        measured = _numbers([cell.measured for cell in column_cells], name, several)
        columns |= {f"{name} [{measured_on}]": measured.pop(name), **measured}
        columns[f"{name} paper"] = [cell.paper for cell in column_cells]
        if gains:
            columns |= _numbers([cell.gain for cell in column_cells], f"{name} gain", several)
            columns[f"{name} gain paper"] = [cell.paper_gain for cell in column_cells]
    return pl.DataFrame(columns, strict=False).write_csv(float_precision=1)


def as_markdown(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """A line of measured numbers and a line of the paper's for each row, under a grouped head."""
    table = settings.table
    columns = list(zip(*cells, strict=True))
    values = [_emphasize_best([c.measured and c.measured.value for c in cs]) for cs in columns]
    papers = [_emphasize_best([c.paper for c in cs]) for cs in columns]
    lines = _head(settings)
    for i, row in enumerate(table.rows):
        if row.run is not None:
            texts = (_measured(v[i], c) for v, c in zip(values, cells[i], strict=True))
            lines.append([f"**{row.label}**", *texts])
        if row.reported is not None:
            texts = (_paper(v[i], c) for v, c in zip(papers, cells[i], strict=True))
            label = f"{row.label} <sub>(reported)</sub>" if row.run is None else "<sub>paper</sub>"
            lines.append([label, *texts])
    head = MEASURED.format(study=settings.study)
    notes = "".join(_notes(settings))
    return f"**{table.title}**\n\n{head}\n{markdown_table(lines)}\n{notes}"


def measured_on(column: Column, settings: TableSettings) -> str:
    """Data set behind a column, or of how many it is the mean."""
    num = len(column.measures)
    return f"mean of {num}" if num > 1 else _datasets(column, settings)[0]


def _numbers(
    estimates: Sequence[Estimate | None], name: str, several: bool
) -> dict[str, list[float | None]]:
    """Head -> value, ends of the interval and, with several trainings, their deviation."""
    heads = {name: "value", f"{name} 95% low": "low", f"{name} 95% high": "high"}
    if several:
        heads[f"{name} std"] = "std"
    return {
        head: [None if e is None else getattr(e, field) for e in estimates]
        for head, field in heads.items()
    }


def _head(settings: TableSettings) -> list[list[str]]:
    """Lines with benchmarks, rule, data sets, metrics."""
    table = settings.table
    benchmarks, datasets = [table.row_header], [""]
    for benchmark, group in groupby(table.columns, key=lambda column: column.benchmark):
        column, *others = group
        # Markdown cannot join cells: a group's name stands over its first column.
        benchmarks += [benchmark] + [""] * len(others)
        datasets += [f"*{measured_on(column, settings)}*"] + [""] * len(others)
    rule = ["---"] + ["---:"] * len(table.columns)
    metrics = ["", *(metric_name(column.metric) for column in table.columns)]
    return [benchmarks, rule, datasets, metrics]


def _measured(value: str, cell: Cell) -> str:
    """`71.2 ± 0.8 (+3.1)`, and in small print both intervals."""
    assert cell.measured is not None
    spread = "" if cell.measured.std is None else f" ± {cell.measured.std:.1f}"
    ends = f"{cell.measured.low:.1f}-{cell.measured.high:.1f}"
    if cell.gain is None:
        return f"{value}{spread}<br><sub>{ends}</sub>"
    gain_ends = f"{cell.gain.low:+.1f} to {cell.gain.high:+.1f}"
    return f"{value}{spread} ({cell.gain.value:+.1f})<br><sub>{ends} ({gain_ends})</sub>"


def _paper(value: str, cell: Cell) -> str:
    gain = "" if cell.paper_gain is None else f" ({cell.paper_gain:+.1f})"
    return f"<sub>{value}{gain}</sub>" if value else ""


def _notes(settings: TableSettings) -> Iterable[str]:
    """What is to be known of the numbers, as far as the table has such."""
    rows: Sequence[Row] = settings.table.rows
    if any(row.run for row in rows):
        yield INTERVALS
    if any(len(names) > 1 for names in settings.runs.values()):
        yield SEEDS
    if any(row.gain_over for row in rows):
        yield GAINS
    if any(row.reported is not None for row in rows):
        yield PAPER
    yield BEST
    for column in {column.benchmark: column for column in settings.table.columns}.values():
        if len(column.measures) > 1:
            yield f"*{column.benchmark}*: mean of {', '.join(_members(column, settings))}.\n"


def _members(column: Column, settings: TableSettings) -> list[str]:
    """Data sets that a mean is taken of, with the metric where there are several metrics."""
    measures = column.measures
    if len({measure.metric for measure in measures}) == 1:
        return [settings.datasets[measure.benchmark] for measure in measures]
    return [f"{settings.datasets[m.benchmark]} {metric_name(m.metric)}" for m in measures]


def _datasets(column: Column, settings: TableSettings) -> list[str]:
    """Data sets behind a column, each once."""
    return list(dict.fromkeys(settings.datasets[m.benchmark] for m in column.measures))


def _emphasize_best(values: Sequence[float | None]) -> list[str]:
    """Values with one decimal, the largest in bold, missing ones empty."""
    texts = ["" if value is None else f"{value:.1f}" for value in values]
    best = max(texts, key=lambda text: float(text or "-inf"))
    return [f"**{text}**" if text and text == best else text for text in texts]
