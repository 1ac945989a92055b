"""A filled table of the paper -> CSV and Markdown."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import polars as pl

from flame.config import TableSettings

LEGEND = """\
Measured in the *{study}* study, in percent; in small print the 95 % bootstrap interval over the
queries; bold is the best of a column. In italics, under each benchmark of the paper, the data set
that was measured for it. Lines marked "paper" are the numbers that the paper reports on the
benchmark itself; where another data set stands in for it, the sizes of the two are not comparable,
only how a column runs from row to row.
"""


class Cell(NamedTuple):
    """A run in a column; numbers in percent."""

    value: float
    low: float
    high: float
    paper: float | None


def as_csv(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """One line per row; per column value, ends of the interval and paper's number, one decimal."""
    table = settings.table
    columns: dict[str, Sequence] = {table.row_header: [row.label for row in table.rows]}
    for column, values in zip(table.columns, zip(*cells, strict=True), strict=True):
        name = f"{column.benchmark} {column.metric}"
        measured_on = "+".join(settings.datasets[benchmark] for benchmark in column.benchmarks)
        heads = (f"{name} [{measured_on}]", f"{name} 95% low", f"{name} 95% high", f"{name} paper")
        columns |= dict(zip(heads, zip(*values, strict=True), strict=True))
    return pl.DataFrame(columns).write_csv(float_precision=1)


def as_markdown(cells: Sequence[Sequence[Cell]], settings: TableSettings) -> str:
    """Two lines per row, measured and reported, under a head that groups metrics by benchmark."""
    table = settings.table
    columns = list(zip(*cells, strict=True))
    values = [_emphasize_best([cell.value for cell in column]) for column in columns]
    papers = [_emphasize_best([cell.paper for cell in column]) for column in columns]
    lines = _head(settings)
    for i, row in enumerate(table.rows):
        intervals = (f"<br><sub>{cell.low:.1f}-{cell.high:.1f}</sub>" for cell in cells[i])
        lines.append(
            [f"**{row.label}**", *(v[i] + s for v, s in zip(values, intervals, strict=True))]
        )
        lines.append(["<sub>paper</sub>", *(f"<sub>{paper[i]}</sub>" for paper in papers)])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    means = {column.benchmark: column.mean_of for column in table.columns if column.mean_of}
    members = "".join(
        f"*{name}*: mean of {', '.join(settings.datasets[b] for b in benchmarks)}.\n"
        for name, benchmarks in means.items()
    )
    return f"**{table.title}**\n\n{body}\n\n{LEGEND.format(study=settings.study)}{members}"


def _head(settings: TableSettings) -> list[list[str]]:
    """Lines with benchmarks, rule, data sets, metrics."""
    table = settings.table
    benchmarks, datasets = [table.row_header], [""]
    for benchmark, group in groupby(table.columns, key=lambda column: column.benchmark):
        column, *others = group
        num = len(column.mean_of)
        dataset = f"mean of {num} sets" if num else settings.datasets[benchmark]
        # Markdown cannot join cells: a group's name stands over its first column.
        benchmarks += [benchmark] + [""] * len(others)
        datasets += [f"*{dataset}*"] + [""] * len(others)
    rule = ["---"] + ["---:"] * len(table.columns)
    metrics = ["", *(_metric_name(column.metric) for column in table.columns)]
    return [benchmarks, rule, datasets, metrics]


def _emphasize_best(values: Sequence[float | None]) -> list[str]:
    """Values with one decimal, the largest in bold, missing ones empty."""
    texts = ["" if value is None else f"{value:.1f}" for value in values]
    best = max(texts, key=lambda text: float(text or "-inf"))
    return [f"**{text}**" if text and text == best else text for text in texts]


def _metric_name(metric: str) -> str:
    """`i2t_r@1` -> `I2T R@1`, `top1` -> `top-1`."""
    return metric.upper().replace("_", " ") if "_" in metric else metric.replace("top", "top-")
