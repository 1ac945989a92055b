"""Values of runs and paired differences between runs, in percent, with bootstrap intervals."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from flame.evaluation import records
from flame.evaluation.bootstrap import mean_interval
from flame.evaluation.records import Queries
from flame.runtime.errors import known
from flame.study.schema.benchmarks import Bootstrap
from flame.study.schema.tables import Measure


class Estimate(NamedTuple):
    """A value in percent, or a difference in points."""

    value: float
    low: float
    high: float
    """Ends of the 95 % bootstrap interval over the queries."""
    std: float | None = None
    """Sample standard deviation over the trainings; None for a single training."""


@dataclass(frozen=True)
class Results:
    """Per-query results of runs, each trained with one or several seeds."""

    answers: Mapping[tuple[str, str, str], Queries]
    """(training, benchmark, metric) -> queries."""
    runs: Mapping[str, tuple[str, ...]]
    """Run -> its trainings, one per seed."""
    bootstrap: Bootstrap

    def rate(self, run: str, measures: Sequence[Measure]) -> Estimate:
        """Value of a run: the unweighted mean of some measures, over the trainings of the run."""
        each = [self._mean((training,), measures) for training in self._trainings(run)]
        return self._estimate(measures, each)

    def difference(self, better: str, worse: str, measures: Sequence[Measure]) -> Estimate:
        """Difference of two runs, paired by query: bootstrap samples are the same for both.

        If both runs have the same number of trainings, `std` is over pairs of trainings.

        Raises:
            ValueError: the two runs have different queries.
        """
        sides = self._trainings(better), self._trainings(worse)
        pairs: list[tuple[tuple[str, ...], tuple[str, ...]]] = [sides]
        if len(sides[0]) == len(sides[1]):
            pairs = [((a,), (b,)) for a, b in zip(*sides, strict=True)]
        each = []
        for one, other in pairs:
            both = zip(self._mean(one, measures), self._mean(other, measures), strict=True)
            each.append([_minus(a, b, (better, worse)) for a, b in both])
        return self._estimate(measures, each)

    def _trainings(self, run: str) -> tuple[str, ...]:
        if run not in self.runs:
            raise ValueError(f"no trainings of run {known(run, self.runs)}")
        return self.runs[run]

    def _queries(self, training: str, measure: Measure) -> Queries:
        key = training, measure.benchmark, measure.metric
        if key in self.answers:
            return self.answers[key]
        asked = [(t, b) for t, b, _ in self.answers]
        if key[:2] not in asked:
            what = known(key[:2], dict.fromkeys(asked))
            raise ValueError(f"no metrics of run and benchmark {what}")
        metrics = [m for t, b, m in self.answers if (t, b) == key[:2]]
        raise ValueError(f"benchmark {key[1]!r} has no metric {known(key[2], metrics)}")

    def _mean(self, trainings: Sequence[str], measures: Sequence[Measure]) -> list[Queries]:
        """Per-query mean over trainings, for each measure."""
        return [_mean([self._queries(t, measure) for t in trainings]) for measure in measures]

    def _estimate(self, measures: Sequence[Measure], each: Sequence[Sequence[Queries]]) -> Estimate:
        """Estimate from queries per training and, within it, per measure."""
        totals = [fmean(float(queries.values.mean()) for queries in one) for one in each]
        together = defaultdict(list)
        for measure, trainings in zip(measures, zip(*each, strict=True), strict=True):
            queries = _mean(trainings)
            together[measure.benchmark, queries.keys].append(queries.values)
        groups = [np.stack(group) for group in together.values()]
        low, high = mean_interval(groups, **self.bootstrap.model_dump())
        std = 100 * stdev(totals) if len(totals) > 1 else None
        return Estimate(100 * fmean(totals), 100 * low, 100 * high, std)


def read(
    metrics: Iterable[Path],
    hits: Iterable[Path],
    runs: Mapping[str, tuple[str, ...]],
    bootstrap: Bootstrap,
) -> Results:
    """Results from the files of the evaluate and few-shot stages.

    Args:
        metrics: JSON files.
        hits: the Parquet file beside each of them, in any order.
        runs: run -> its trainings.
        bootstrap: settings of all intervals.

    Raises:
        ValueError: a JSON file has no Parquet file beside it, or the two contradict each other.
    """
    tables = {path.with_suffix(""): path for path in hits}
    answers: dict[tuple[str, str, str], Queries] = {}
    for path in metrics:
        if path.with_suffix("") not in tables:
            raise ValueError(
                f"{path}: no Parquet file beside it; given: {known(path, tables.values())}"
            )
        answers |= records.read(path, tables[path.with_suffix("")])
    return Results(answers, runs, bootstrap)


def _mean(trainings: Sequence[Queries]) -> Queries:
    keys = trainings[0].keys
    if any(queries.keys != keys for queries in trainings):
        raise ValueError("trainings of one run have different queries")
    return Queries(keys, np.mean([queries.values for queries in trainings], axis=0))


def _minus(better: Queries, worse: Queries, runs: tuple[str, str]) -> Queries:
    if better.keys != worse.keys:
        raise ValueError(f"runs {runs[0]!r} and {runs[1]!r} have different queries")
    return Queries(better.keys, better.values - worse.values)
