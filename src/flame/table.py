"""Metrics of runs -> a table of the paper, with its reported number beside every measured one."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from flame import command
from flame.bootstrap import interval
from flame.config import Bootstrap, Column, Row, Table, TableSettings, known
from flame.partial import write_atomic
from flame.render import Cell, as_csv, as_markdown


def table(
    metrics: list[Path], reported: Path, csv: Path, markdown: Path, settings: TableSettings
) -> None:
    """Fill one table of the paper.

    Args:
        metrics: JSON files of the evaluate stage.
        reported: CSV of the paper's numbers, one a row.
        csv: CSV to write: per column the value, both ends of its interval, the paper's number.
        markdown: the same, to be read.
        settings: rows and columns.
    """
    results = [json.loads(path.read_text()) for path in metrics]
    records = {(r["run"], r["benchmark"]): r for result in results for r in result["records"]}
    bootstrap = Bootstrap.model_validate(results[0]["settings"]["bootstrap"])
    numbers = pl.read_csv(reported, infer_schema=False)
    cells = [
        [
            Cell(
                *measured(records, row.run, column, bootstrap),
                paper_value(numbers, settings.table, row, column),
            )
            for column in settings.table.columns
        ]
        for row in settings.table.rows
    ]
    write_atomic(csv, as_csv(cells, settings).encode())
    write_atomic(markdown, as_markdown(cells, settings).encode())


def measured(
    records: Mapping[tuple[str, str], Mapping[str, Any]],
    run: str,
    column: Column,
    bootstrap: Bootstrap,
) -> tuple[float, float, float]:
    """Value and 95 % interval in percent: of a benchmark, or of the unweighted mean of several.

    Args:
        records: (run, benchmark) -> record of the evaluate stage.
        run: the row's run.
        column: benchmarks and metric.
        bootstrap: of the interval.
    """
    counts = []
    for benchmark in column.benchmarks:
        if (run, benchmark) not in records:
            raise ValueError(f"no metrics of run and benchmark {known((run, benchmark), records)}")
        values = records[run, benchmark]["metrics"]
        if column.metric not in values:
            raise ValueError(
                f"benchmark {benchmark!r} has no metric {known(column.metric, values)}"
            )
        counts.append((values[column.metric]["hits"], values[column.metric]["queries"]))
    hits, queries = zip(*counts, strict=True)
    low, high = interval(hits, queries, **bootstrap.model_dump())
    return 100 * fmean(h / q for h, q in counts), 100 * low, 100 * high


def paper_value(reported: pl.DataFrame, table: Table, row: Row, column: Column) -> float | None:
    """The number that the paper reports for a cell, in percent; None where it left it empty.

    Args:
        reported: numbers of the paper, all columns as text.
        table: says which of them belong to the table.
        row: says which of these belong to the row.
        column: its benchmark and metric.
    """
    wanted = {
        **table.reported.match,
        **row.reported,
        "benchmark": column.benchmark,
        "metric": column.reported_metric or column.metric,
    }
    for name in wanted:
        if name not in reported.columns:
            raise ValueError(f"{table.reported.file}: no column {known(name, reported.columns)}")
    found = reported.filter(**{name: str(value) for name, value in wanted.items()})
    if len(found) != 1:
        raise ValueError(f"{table.reported.file}: {len(found)} rows, not one, have {wanted}")
    value = found["value"].item()
    return None if value is None else float(value)


if __name__ == "__main__":
    command.main(table)
