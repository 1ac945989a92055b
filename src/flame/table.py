"""Metrics of runs -> a table of the paper, with its reported number beside every measured one."""

from pathlib import Path

import polars as pl

from flame.report import check_table, results, results_table, verdicts
from flame.report.reported import matching, number, read
from flame.report.results import Results
from flame.report.results_table import Cell
from flame.runtime import command
from flame.runtime.resumable import write_atomic
from flame.study.schema.tables import Column, Row, Table
from flame.study.settings import TableSettings


def table(
    metrics: list[Path],
    hits: list[Path],
    reported: Path,
    csv: Path,
    markdown: Path,
    settings: TableSettings,
) -> None:
    """Fill one table of the paper.

    Args:
        metrics: JSON files of the evaluate and few-shot stages.
        hits: the Parquet file beside each of them.
        reported: CSV of the paper's numbers, one a row.
        csv: CSV to write: per column the value, both ends of its interval, the paper's number;
            of a table with a tolerance these, and a verdict, in one line for each number.
        markdown: the same, to be read, and the claims of the paper that belong to the table.
        settings: rows, columns and claims.
    """
    answers = results.read(metrics, hits, settings.runs, settings.bootstrap)
    printed = read(reported, settings.table.reported)
    cells = [
        [cell(answers, printed, settings.table, row, column) for column in settings.table.columns]
        for row in settings.table.rows
    ]
    judged = [verdicts.judge(claim, answers, {}) for claim in settings.claims]
    form = results_table if settings.table.tolerance is None else check_table
    text = form.as_markdown(cells, settings)
    if judged:
        text += f"\n**Claims**\n\n{verdicts.as_markdown(judged, settings.datasets)}"
    write_atomic(csv, form.as_csv(cells, settings).encode())
    write_atomic(markdown, text.encode())


def cell(answers: Results, printed: pl.DataFrame, table: Table, row: Row, column: Column) -> Cell:
    """What was measured, and what the paper reports, for a row in a column.

    Args:
        answers: of the runs.
        printed: the table's numbers in the paper; a benchmark that none of them is of has none.
        table: where they are from.
        row: its run, and which of the numbers belong to it.
        column: benchmarks and metric.
    """
    measured, gain, paper, paper_gain = None, None, None, None
    if row.run is not None:
        measured = answers.rate(row.run, column.measures)
        if row.gain_over is not None:
            gain = answers.difference(row.run, row.gain_over, column.measures)
    name = column.printed
    if row.reported is not None and name.benchmark in printed["benchmark"]:
        wanted = {**row.reported, **name.model_dump()}
        paper = number(printed, table.reported.file, wanted)
        gains = wanted | {"metric": f"{name.metric}_gain_over_clip"}
        # Table 7 prints a gain of visual backbones, and none of LLMs.
        if row.gain_over and not matching(printed, table.reported.file, gains).is_empty():
            paper_gain = number(printed, table.reported.file, gains)
    return Cell(measured, paper, gain, paper_gain)


if __name__ == "__main__":
    command.main(table)
