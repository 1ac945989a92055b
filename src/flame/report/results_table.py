"""A table of the paper, filled with measured and reported numbers, as CSV and as Markdown."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import polars as pl

from flame.report.markdown import bullet_list, markdown_table, metric_name
from flame.report.reported import matching, number
from flame.report.results import Estimate, Results
from flame.study.schema.tables import Column, Row, Table
from flame.study.settings import TableSettings

MEASURED = """\
Results of the *{study}* study, in percent. The data set in italics below each benchmark is the one
that was measured; if it is not the benchmark itself, it is a stand-in for it.
"""
INTERVALS = "Small print below a measured number: 95 % bootstrap interval over the queries."
SEEDS = "Runs trained with several seeds: mean ± standard deviation over the seeds."
GAINS = (
    "In parentheses: gain over the same tower trained as CLIP, with a paired interval if measured."
)
PAPER = (
    'Rows marked "paper" or "reported": numbers printed in the paper, on its own benchmarks. Rows '
    'marked "reported" were not measured here. If a data set is a stand-in, absolute values are '
    "not comparable with the paper's, only the trend from row to row is."
)
BEST = (
    "Bold: highest value of a column, separately for measured and printed numbers; this does not "
    "imply a significant difference."
)


class Cell(NamedTuple):
    """One cell: a row in a column."""

    measured: Estimate | None
    paper: float | None
    """In percent, as printed in the paper."""
    gain: Estimate | None = None
    paper_gain: float | None = None
    """In points."""


def fill(results: Results, printed: pl.DataFrame, table: Table) -> list[list[Cell]]:
    """Cells of a table, row by row.

    Args:
        results: measured values of the runs.
        printed: the paper's numbers for this table.
        table: rows and columns.
    """
    return [[cell(results, printed, table, row, c) for c in table.columns] for row in table.rows]


def cell(results: Results, printed: pl.DataFrame, table: Table, row: Row, column: Column) -> Cell:
    """The measured value and the paper's number for a row in a column.

    Args:
        results: measured values of the runs.
        printed: the paper's numbers for this table. A benchmark that does not occur in them has no
            reported number.
        table: names the file of the paper's numbers.
        row: the run, and the selection of its reported numbers.
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
        # Table 7 prints gains for visual backbones, but not for LLMs.
        if row.gain_over and not matching(printed, table.reported.file, gains).is_empty():
            paper_gain = number(printed, table.reported.file, gains)
    return Cell(measured, paper, gain, paper_gain)


def as_csv(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """CSV with one line per row and one column per number, rounded to one decimal."""
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
    """Markdown with a line of measured and a line of reported numbers per row, and notes."""
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
    notes = bullet_list(_notes(settings))
    return f"**{table.title}**\n\n{head}\n{markdown_table(lines)}\n{notes}"


def measured_on(column: Column, settings: TableSettings) -> str:
    """Data set of a column, or `mean of n`."""
    num = len(column.measures)
    return f"mean of {num}" if num > 1 else _datasets(column, settings)[0]


def _numbers(
    estimates: Sequence[Estimate | None], name: str, several: bool
) -> dict[str, list[float | None]]:
    """Columns of value, interval ends and, with several seeds, standard deviation."""
    heads = {name: "value", f"{name} 95% low": "low", f"{name} 95% high": "high"}
    if several:
        heads[f"{name} std"] = "std"
    return {
        head: [None if e is None else getattr(e, field) for e in estimates]
        for head, field in heads.items()
    }


def _head(settings: TableSettings) -> list[list[str]]:
    """The first four rows: benchmarks, alignments, data sets, metrics."""
    table = settings.table
    benchmarks, datasets = [table.row_header], [""]
    for benchmark, group in groupby(table.columns, key=lambda column: column.benchmark):
        column, *others = group
        # Markdown cannot merge cells: the name of a group stands over its first column.
        benchmarks += [benchmark] + [""] * len(others)
        datasets += [f"*{measured_on(column, settings)}*"] + [""] * len(others)
    rule = ["---"] + ["---:"] * len(table.columns)
    metrics = ["", *(metric_name(column.metric) for column in table.columns)]
    return [benchmarks, rule, datasets, metrics]


def _measured(value: str, cell: Cell) -> str:
    """`71.2 ± 0.8 (+3.1)`, with both intervals in small print."""
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
    """Notes on the kinds of numbers that occur in the table."""
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
            yield f"*{column.benchmark}*: mean of {', '.join(_members(column, settings))}."


def _members(column: Column, settings: TableSettings) -> list[str]:
    """Data sets of a mean, each with its metric if the metrics differ."""
    measures = column.measures
    if len({measure.metric for measure in measures}) == 1:
        return [settings.datasets[measure.benchmark] for measure in measures]
    return [f"{settings.datasets[m.benchmark]} {metric_name(m.metric)}" for m in measures]


def _datasets(column: Column, settings: TableSettings) -> list[str]:
    """Data sets of a column, without duplicates."""
    return list(dict.fromkeys(settings.datasets[m.benchmark] for m in column.measures))


def _emphasize_best(values: Sequence[float | None]) -> list[str]:
    """Values with one decimal: the largest in bold, missing ones empty."""
    texts = ["" if value is None else f"{value:.1f}" for value in values]
    best = max(texts, key=lambda text: float(text or "-inf"))
    return [f"**{text}**" if text and text == best else text for text in texts]
