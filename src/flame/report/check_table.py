"""A check: which measured numbers agree with published ones, within a tolerance."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import polars as pl

from flame.report.markdown import markdown_table, metric_name
from flame.report.results import Estimate
from flame.report.results_table import Cell, column_name
from flame.study.schema.tables import Column, Row, Table
from flame.study.settings import TableSettings

HEAD = """\
Results of the *{study}* study compared with published numbers of the same weights, in percent.
Sources: `{file}`. Of {total} numbers, **{agrees} agree**, **{differs} differ** and
{missing} were not measured.

- A number **agrees** if it is within {tolerance:g} points of the published one. Otherwise it
  **differs**, and the verdict suggests where to look first.
- Small print below a measured number: 95 % interval over the queries. It does not affect the
  verdict, since both numbers come from the same queries.
"""
# Hints on the cause, by what else differs.
DATA = "most baselines differ on this benchmark: check the images and texts of the data set"
TOWER = "most numbers of this baseline differ: check its weights, preprocessing and tokenizer"
BOTH = "isolated difference: check how this baseline reads these texts (length, language, template)"

Word = Literal["agrees", "differs", "not measured"]


class Check(NamedTuple):
    """A measured number and its published counterpart."""

    row: Row
    column: Column
    published: float
    measured: Estimate | None
    difference: float | None
    """Measured minus published, in points, rounded to two decimals as published numbers are."""
    word: Word


def as_csv(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """CSV with one line per number."""
    checks = _checked(cells, settings.table)
    records = [
        {
            settings.table.row_header: check.row.label,
            "benchmark": column_name(check.column, settings),
            "metric": check.column.metric,
            "published": check.published,
            "measured": check.measured and check.measured.value,
            "95% low": check.measured and check.measured.low,
            "95% high": check.measured and check.measured.high,
            "difference": check.difference,
            "verdict": check.word,
            "hint": _hint(check, checks),
        }
        for check in checks
    ]
    return pl.DataFrame(records, infer_schema_length=None).write_csv(float_precision=2)


def as_markdown(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """Markdown with one line per number, under a summary."""
    table, checks = settings.table, _checked(cells, settings.table)
    words = [check.word for check in checks]
    assert table.reported is not None
    head = HEAD.format(
        study=settings.study,
        file=table.reported.file,
        total=len(words),
        agrees=words.count("agrees"),
        differs=words.count("differs"),
        missing=words.count("not measured"),
        tolerance=table.tolerance,
    )
    names = [
        table.row_header,
        "benchmark",
        "metric",
        "published",
        "measured",
        "difference",
        "verdict",
    ]
    rule = ["---"] * 3 + ["---:"] * 3 + ["---"]
    lines = [_line(check, _hint(check, checks), settings) for check in checks]
    return f"**{table.title}**\n\n{head}\n{markdown_table([names, rule, *lines])}"


def _checked(cells: Sequence[Sequence[Cell]], table: Table) -> list[Check]:
    return [
        _check(row, column, cell, table)
        for row, row_cells in zip(table.rows, cells, strict=True)
        for column, cell in zip(table.columns, row_cells, strict=True)
    ]


def _check(row: Row, column: Column, cell: Cell, table: Table) -> Check:
    name, measured = column.printed, cell.measured
    assert table.tolerance is not None
    assert table.reported is not None
    if cell.paper is None:
        what = f"{name.benchmark} {name.metric} of {row.label!r}"
        raise ValueError(f"{table.reported.file}: no published number for {what}")
    if measured is None:
        return Check(row, column, cell.paper, None, None, "not measured")
    # Judge the rounded value that is shown, not 0.5000000000000142; `+ 0.0` turns -0.0 into 0.0.
    difference = round(measured.value - cell.paper, 2) + 0.0
    word: Word = "agrees" if abs(difference) <= table.tolerance else "differs"
    return Check(row, column, cell.paper, measured, difference, word)


def _hint(check: Check, checks: Sequence[Check]) -> str | None:
    """Where the cause of a difference may lie; None if the numbers agree."""
    if check.word != "differs":
        return None
    here = [c for c in checks if c.column.benchmark == check.column.benchmark]
    if len({c.row.label for c in here if c.measured}) > 1 and _most_differ(here):
        return DATA
    if _most_differ(c for c in checks if c.row == check.row):
        return TOWER
    return BOTH


def _most_differ(checks: Iterable[Check]) -> bool:
    words = [check.word for check in checks if check.measured]
    return words.count("differs") > len(words) / 2


def _line(check: Check, hint: str | None, settings: TableSettings) -> Sequence[str]:
    benchmark = column_name(check.column, settings)
    measured = difference = ""
    if check.measured is not None:
        ends = f"{check.measured.low:.1f}-{check.measured.high:.1f}"
        measured = f"{check.measured.value:.2f}<br><sub>{ends}</sub>"
        difference = f"{check.difference:+.2f}"
    verdict = f"**differs**: {hint}" if hint else check.word
    metric = metric_name(check.column.metric)
    published = f"{check.published:.2f}"
    return check.row.label, benchmark, metric, published, measured, difference, verdict
