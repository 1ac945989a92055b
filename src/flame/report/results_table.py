"""A table of the paper, filled with measured and reported numbers, as CSV and as Markdown."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import polars as pl

from flame.report.markdown import bullet_list, markdown_table, metric_name
from flame.report.reported import matching, number
from flame.report.results import Estimate, Results
from flame.study import names
from flame.study.schema.tables import Column, Row, Table
from flame.study.settings import FigureSettings, TableSettings

MEASURED = "Results of the *{study}* study, in percent.\n"
STAND_INS = "*{name}*: measured on {dataset}, which stands in for {benchmark}.\n"
INTERVALS = (
    "Small print below a measured number: 95 % interval. It covers the choice of the queries and "
    "the chance in the trainings (docs/statistics.md)."
)
QUERIES_ONLY = (
    "†: too few trainings of its kind to tell how much trainings differ. The interval covers the "
    "choice of the queries only."
)
CHANCE = "°: the interval contains chance. All other measured numbers differ from it."
NO_CHANCE = "No interval contains chance."
SEEDS = "Runs trained several times: mean ± standard deviation over the trainings."
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
    chance: float | None = None
    """Of a guess, in percent."""

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval contains the value of a guess."""
        if self.measured is None or self.chance is None:
            return False
        return self.measured.low <= self.chance <= self.measured.high


def fill(results: Results, printed: pl.DataFrame | None, table: Table) -> list[list[Cell]]:
    """Cells of a table, row by row.

    Args:
        results: measured values of the runs.
        printed: the paper's numbers for this table, if it is one of the paper's.
        table: rows and columns.
    """
    return [[cell(results, printed, table, row, c) for c in table.columns] for row in table.rows]


def cell(
    results: Results, printed: pl.DataFrame | None, table: Table, row: Row, column: Column
) -> Cell:
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
    if (
        printed is not None
        and table.reported is not None
        and row.reported is not None
        and name.benchmark in printed["benchmark"]
    ):
        file, wanted = table.reported.file, {**row.reported, **name.model_dump()}
        paper = number(printed, file, wanted)
        gains = wanted | {"metric": f"{name.metric}_gain_over_clip"}
        # Table 7 prints gains for visual backbones, but not for LLMs.
        if row.gain_over and not matching(printed, file, gains).is_empty():
            paper_gain = number(printed, file, gains)
    return Cell(measured, paper, gain, paper_gain, column.chance)


def as_csv(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """CSV with one line per row and one column per number, rounded to one decimal."""
    table = settings.table
    columns: dict[str, Sequence] = {table.row_header: [row.label for row in table.rows]}
    several = _is_replicated(settings)
    gains = any(row.gain_over for row in table.rows)
    for column, column_cells in zip(table.columns, zip(*cells, strict=True), strict=True):
        name = f"{column_name(column, settings)} {column.metric}"
        printed = f"{column.benchmark} {column.metric}"
        columns |= _numbers([cell.measured for cell in column_cells], name, several)
        if table.reported is not None:
            columns[f"{printed} paper"] = [cell.paper for cell in column_cells]
        if gains:
            columns |= _numbers([cell.gain for cell in column_cells], f"{name} gain", several)
            if table.reported is not None:
                columns[f"{printed} gain paper"] = [cell.paper_gain for cell in column_cells]
        if column.chance is not None:
            columns[f"{printed} chance"] = [column.chance] * len(table.rows)
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
    if any(column.chance is not None for column in table.columns):
        chances = ("" if c.chance is None else f"<sub>{c.chance:.1f}</sub>" for c in table.columns)
        lines.append(["<sub>chance</sub>", *chances])
    head = MEASURED.format(study=settings.study) + _example(settings)
    notes = bullet_list(_notes(cells, settings))
    return f"**{table.title}**\n\n{head}\n{markdown_table(lines)}\n{notes}"


def column_name(column: Column, settings: TableSettings | FigureSettings) -> str:
    """What was measured in a column, such as `nouns (for ImageNet-1k)`."""
    return names.of_measures(column.benchmark, column.measures, *settings.measured)


def _example(settings: TableSettings) -> str:
    """What the name of a stand-in says, for the first one in the table."""
    for measure in settings.table.measures:
        benchmark = measure.benchmark
        if benchmark in settings.stand_ins:
            dataset = settings.datasets[benchmark]
            name = names.called(benchmark, [dataset], stand_in=True)
            return STAND_INS.format(name=name, dataset=dataset, benchmark=benchmark)
    return ""


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
    """The first three rows: benchmarks, alignments, metrics."""
    table = settings.table
    benchmarks = [table.row_header]
    for _, group in groupby(table.columns, key=lambda column: column.benchmark):
        column, *others = group
        # Markdown cannot merge cells: the name of a group stands over its first column.
        benchmarks += [column_name(column, settings)] + [""] * len(others)
    rule = ["---"] + ["---:"] * len(table.columns)
    metrics = ["", *(metric_name(column.metric) for column in table.columns)]
    return [benchmarks, rule, metrics]


def _measured(value: str, cell: Cell) -> str:
    """`71.2 ± 0.8 (+3.1)`, with both intervals in small print."""
    assert cell.measured is not None
    spread = "" if cell.measured.std is None else f" ± {cell.measured.std:.1f}"
    mark = ("" if cell.measured.trainings else "†") + ("°" if cell.may_be_chance else "")
    ends = f"{cell.measured.low:.1f}-{cell.measured.high:.1f}{mark}"
    if cell.gain is None:
        return f"{value}{spread}<br><sub>{ends}</sub>"
    mark = "" if cell.gain.trainings else "†"
    gain_ends = f"{cell.gain.low:+.1f} to {cell.gain.high:+.1f}{mark}"
    return f"{value}{spread} ({cell.gain.value:+.1f})<br><sub>{ends} ({gain_ends})</sub>"


def _paper(value: str, cell: Cell) -> str:
    gain = "" if cell.paper_gain is None else f" ({cell.paper_gain:+.1f})"
    return f"<sub>{value}{gain}</sub>" if value else ""


def _is_replicated(settings: TableSettings) -> bool:
    """Whether any run of the table was trained several times."""
    return any(len(settings.runs[run].trainings) > 1 for run in settings.table.runs)


def _notes(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> Iterable[str]:
    """Notes on the kinds of numbers that occur in the table."""
    rows: Sequence[Row] = settings.table.rows
    if any(row.run for row in rows):
        yield INTERVALS
    estimates = [each for row in cells for cell in row for each in (cell.measured, cell.gain)]
    if any(each is not None and not each.trainings for each in estimates):
        yield QUERIES_ONLY
    if any(cell.may_be_chance for row in cells for cell in row):
        yield CHANCE
    elif any(cell.measured and cell.chance is not None for row in cells for cell in row):
        yield NO_CHANCE
    if _is_replicated(settings):
        yield SEEDS
    if any(row.gain_over for row in rows):
        yield GAINS
    if any(row.reported is not None for row in rows):
        yield PAPER
    yield BEST
    for column in {column.benchmark: column for column in settings.table.columns}.values():
        if len(column.measures) > 1:
            name = column_name(column, settings)
            yield f"*{name}*: mean of {', '.join(_members(column, settings))}."


def _members(column: Column, settings: TableSettings) -> list[str]:
    """Benchmarks of a mean, each with its metric if the metrics differ."""
    measures, given = column.measures, settings.measured
    each = [names.of_measures(m.benchmark, [m], *given) for m in measures]
    if len({measure.metric for measure in measures}) == 1:
        return each
    return [f"{name} {metric_name(m.metric)}" for name, m in zip(each, measures, strict=True)]


def _emphasize_best(values: Sequence[float | None]) -> list[str]:
    """Values with one decimal: the largest in bold, missing ones empty."""
    texts = ["" if value is None else f"{value:.1f}" for value in values]
    best = max(texts, key=lambda text: float(text or "-inf"))
    return [f"**{text}**" if text and text == best else text for text in texts]
