"""How much every measured number varies: with the seed, with drawn prompts, with the queries."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

import polars as pl

from flame.report import noise
from flame.report.markdown import markdown_table, metric_name
from flame.report.noise import Component, Sample
from flame.report.results import Results
from flame.study import names
from flame.study.schema.tables import Column, Measure
from flame.study.settings import VarianceSettings

PLANNED = (1, 3)  # trainings of each of two runs, for the difference that would be found
LABELS = {"flame": "FLAME", "clip": "CLIP", "long-clip": "Long-CLIP"}
COLUMNS = {
    "tables": pl.String,
    "measured": pl.String,
    "metric": pl.String,
    "method": pl.String,
    "trainings": pl.Int64,
    "seeds": pl.Float64,
    "seeds_df": pl.Int64,
    "draws": pl.Float64,
    "draws_df": pl.Int64,
    "queries": pl.Float64,
    **{f"found_{number}": pl.Float64 for number in PLANNED},
}
PREAMBLE = """\
# How much the numbers of the *{study}* study vary

In percentage points, for every column of a table. docs/statistics.md explains the model.

- **seeds**: standard deviation between trainings that differ in the seed, pooled over runs; in
  brackets its degrees of freedom.
- **draws**: what drawing the prompts at random adds to it; 0 if such runs vary no more than others.
- **queries**: standard error over the queries, of the mean over the trainings of a run.
- **found with 1**, **with 3**: smallest true difference between two runs, each trained so many
  times, that would be found with a probability of 80 %.
"""
NOTHING = """\
No run of this study was trained several times, so how much trainings differ is unknown: intervals
cover the queries only, and no claim that compares runs has a verdict. Give some runs of every
method three seeds: `seeds: [0, 1, 2]`.
"""


class Variation(NamedTuple):
    """How much one number of one method varies; in points."""

    trainings: int
    """Of all runs that were trained several times."""
    seeds: float | None
    """Standard deviation between trainings, of runs whose prompts are not drawn."""
    seeds_df: int
    draws: float | None
    """Standard deviation that drawn prompts add; never negative."""
    draws_df: int
    queries: float
    """Standard error over the queries."""
    found: tuple[float | None, ...]
    """Smallest difference that would be found, for each of `PLANNED`."""


def as_frame(results: Results, settings: VarianceSettings) -> pl.DataFrame:
    """One row for each method and each column of the tables, without repetition."""
    tables: dict[tuple[Measure, ...], dict[str, Column]] = {}
    for table, columns in settings.tables.items():
        for column in columns:
            tables.setdefault(column.measures, {})[table] = column
    rows = []
    for method, label in LABELS.items():
        for measures, shown in tables.items():
            found = variation(results, method, measures)
            if found is None:
                continue
            first = next(iter(shown.values()))
            name = names.of_measures(
                first.benchmark, measures, settings.datasets, settings.stand_ins
            )
            *numbers, detectable = found
            rows.append((" ".join(shown), name, first.metric, label, *numbers, *detectable))
    return pl.DataFrame(rows, schema=COLUMNS, orient="row")


def variation(results: Results, method: str, measures: Sequence[Measure]) -> Variation | None:
    """How much the mean of some measures varies; None if no run of the method was replicated."""
    replicated = results.replicated(measures)
    own = {run: s for run, s in replicated.items() if results.runs[run].method == method}
    if not own:
        return None
    steady, drawn = (results.component((method, drawn), measures) for drawn in (False, True))
    error = math.sqrt(fmean(noise.queries(s.of_clusters, s.groups).variance for s in own.values()))
    return Variation(
        trainings=sum(len(sample.totals) for sample in own.values()),
        seeds=100 * math.sqrt(steady.spread) if steady else None,
        seeds_df=int(steady.df) if steady else 0,
        draws=100 * math.sqrt(max(0, drawn.spread - steady.spread)) if drawn and steady else None,
        draws_df=int(drawn.df) if drawn else 0,
        queries=100 * error,
        found=tuple(_found(own, replicated, steady or drawn, number) for number in PLANNED),
    )


def _found(
    own: Mapping[str, Sample],
    every: Mapping[str, Sample],
    component: Component | None,
    trainings: int,
) -> float | None:
    """Smallest difference that would be found between two runs, in points.

    Args:
        own: runs of the method.
        every: runs with the same queries.
        component: variance between trainings of the method.
        trainings: of each of the two.
    """
    # Two runs of one method; of a method with one such run, that and those of other methods.
    pairs = list(combinations(own.values(), 2)) or [
        (one, other) for one in own.values() for run, other in every.items() if run not in own
    ]
    if component is None or not pairs:
        return None
    variances, df = [], []
    for one, other in pairs:
        paired = noise.queries(one.of_clusters - other.of_clusters, one.groups)
        # The part that shrinks with the number of trainings is in the component.
        shared = sum(noise.interaction(sample) / len(sample.totals) for sample in (one, other))
        variances.append(max(0.0, paired.variance - shared))
        df.append(paired.df)
    queries = Component(fmean(variances), fmean(variances), fmean(df))
    spread = Component(component.spread, component.spread, component.df)
    return 100 * noise.interval(0.0, [(queries, 1.0), (spread, 2 / trainings)]).detectable


def as_markdown(frame: pl.DataFrame, settings: VarianceSettings) -> str:
    """A page with a summary and a table for each method."""
    parts = [PREAMBLE.format(study=settings.study)]
    if frame.is_empty():
        parts.append(NOTHING)
    for (method,), rows in frame.group_by("method", maintain_order=True):
        parts.append(f"## {method}\n\n{_summary(rows)}\n\n{_table(rows)}")
    return "\n".join(parts)


def _summary(rows: pl.DataFrame) -> str:
    def middle(name: str) -> str:
        values = rows[name].drop_nulls().to_list()
        return f"{median(values):.1f}" if values else "unknown"

    drawn = f", of draws {middle('draws')}" if rows["draws"].drop_nulls().len() else ""
    found = " and ".join(f"{middle(f'found_{n}')} with {n}" for n in PLANNED)
    return (
        f"Medians over {len(rows)} numbers: standard deviation of seeds {middle('seeds')}{drawn},"
        f" standard error over queries {middle('queries')}, smallest difference that would be found"
        f" {found}."
    )


def _table(rows: pl.DataFrame) -> str:
    head = ["measured", "metric", "seeds", "draws", "queries", "trainings"]
    head += [f"found with {number}" for number in PLANNED]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows.iter_rows(named=True):
        lines.append(
            [
                row["measured"],
                metric_name(row["metric"]),
                _cell(row["seeds"], row["seeds_df"]),
                _cell(row["draws"], row["draws_df"]),
                _cell(row["queries"]),
                str(row["trainings"]),
                *(_cell(row[f"found_{number}"]) for number in PLANNED),
            ]
        )
    return markdown_table(lines)


def _cell(value: float | None, df: int | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if df is None else f"{value:.1f} ({df})"
