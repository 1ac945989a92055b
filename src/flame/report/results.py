"""Values of runs and differences between runs, in percent, with intervals.

An interval covers the choice of the queries and the chance in the trainings (`flame.report.noise`).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame.evaluation import records
from flame.evaluation.records import Queries
from flame.report import noise
from flame.report.noise import Component, Sample
from flame.runtime.errors import known
from flame.study.schema.tables import Measure
from flame.study.settings import Compared


class Estimate(NamedTuple):
    """A value in percent, or a difference in points."""

    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    std: float | None = None
    """Sample standard deviation over the trainings; None for a single training."""
    detectable: float | None = None
    """Smallest true difference from 0 that this study would find with a probability of 80 %."""
    trainings: bool = True
    """Whether the interval covers the chance in the trainings. It cannot if too few runs of the
    kind were trained several times."""


@dataclass(frozen=True)
class Results:
    """Per-query results of runs, each trained with one or several seeds."""

    answers: Mapping[tuple[str, str, str], Queries]
    """(training, benchmark, metric) -> queries."""
    runs: Mapping[str, Compared]
    """Those compared, and those that tell how trainings differ."""
    _samples: dict[tuple[str, tuple[Measure, ...]], Sample] = field(
        default_factory=dict, init=False
    )
    """Found before: one run is compared with many."""

    def rate(self, run: str, measures: Sequence[Measure]) -> Estimate:
        """Value of a run: the unweighted mean of some measures, over the trainings of the run."""
        sample = self._sample(run, measures)
        parts = [(noise.queries(sample.of_clusters, sample.groups), 1.0)]
        found = self._estimate(sample.totals, parts, {run: sample}, measures)
        return found._replace(low=max(0.0, found.low), high=min(100.0, found.high))

    def difference(self, better: str, worse: str, measures: Sequence[Measure]) -> Estimate:
        """Difference of two runs, paired by query; their trainings are independent.

        If both runs have the same number of trainings, `std` is over pairs of trainings.

        Raises:
            ValueError: the two runs have different queries.
        """
        samples = {run: self._sample(run, measures) for run in (better, worse)}
        if any(self._keys(better, measure) != self._keys(worse, measure) for measure in measures):
            raise ValueError(f"runs {better!r} and {worse!r} have different queries")
        one, other = samples[better], samples[worse]
        paired = noise.queries(one.of_clusters - other.of_clusters, one.groups)
        if len(one.totals) == len(other.totals):
            totals = one.totals - other.totals
        else:
            totals = np.array([one.totals.mean() - other.totals.mean()])
        return self._estimate(totals, [(paired, 1.0)], samples, measures)

    def values(self, run: str, measures: Sequence[Measure]) -> list[float]:
        """Value of each training of a run, in percent."""
        return [100 * float(total) for total in self._sample(run, measures).totals]

    def replicated(self, measures: Sequence[Measure]) -> dict[str, Sample]:
        """Runs with several trainings on some measures, with their results in the mean."""
        return {
            name: self._sample(name, measures)
            for name, run in self.runs.items()
            if len(run.trainings) > 1 and self._has(name, measures)
        }

    def component(
        self, kind: tuple[str, bool] | None, measures: Sequence[Measure]
    ) -> Component | None:
        """Variance between trainings of a kind in the mean of some measures; None if unknown.

        Args:
            kind: method, and whether the facets are drawn.
            measures: whose unweighted mean is looked at.
        """
        replicated = self.replicated(measures)
        return noise.trainings([s for run, s in replicated.items() if self.runs[run].kind == kind])

    def _estimate(
        self,
        totals: NDArray[np.floating],
        parts: list[tuple[Component, float]],
        samples: Mapping[str, Sample],
        measures: Sequence[Measure],
    ) -> Estimate:
        """Estimate whose interval has these parts and those of the trainings of some runs."""
        factors: dict[tuple[str, bool], float] = defaultdict(float)
        for run, sample in samples.items():
            kind = self.runs[run].kind
            if kind is not None:
                factors[kind] += 1 / len(sample.totals)
        complete = True
        for kind, factor in factors.items():
            component = self.component(kind, measures)
            if component is None:
                complete = False
            else:
                parts.append((component, factor))
        value = float(totals.mean())
        found = noise.interval(value, parts)
        low, high, detectable = (100 * x for x in (found.low, found.high, found.detectable))
        std = 100 * stdev(totals) if len(totals) > 1 else None
        return Estimate(100 * value, low, high, std, detectable, complete)

    def _has(self, run: str, measures: Sequence[Measure]) -> bool:
        return all(
            (training, measure.benchmark, measure.metric) in self.answers
            for training in self.runs[run].trainings
            for measure in measures
        )

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

    def _keys(self, run: str, measure: Measure) -> tuple[str, ...]:
        """Keys of the images that a run is asked about, query by query."""
        if run not in self.runs:
            raise ValueError(f"no trainings of run {known(run, self.runs)}")
        first, *others = (self._queries(t, measure).keys for t in self.runs[run].trainings)
        if any(keys != first for keys in others):
            raise ValueError("trainings of one run have different queries")
        return first

    def _sample(self, run: str, measures: Sequence[Measure]) -> Sample:
        """Results of a run; queries about one image form a cluster, whatever their benchmark."""
        wanted = run, tuple(measures)
        if wanted not in self._samples:
            keys = [self._keys(run, measure) for measure in measures]
            values = [
                np.stack([self._queries(t, measure).values for t in self.runs[run].trainings])
                for measure in measures
            ]
            self._samples[wanted] = noise.sample(zip(keys, values, strict=True))
        return self._samples[wanted]


def read(metrics: Iterable[Path], hits: Iterable[Path], runs: Mapping[str, Compared]) -> Results:
    """Results from the files of the evaluate and few-shot stages.

    Args:
        metrics: JSON files.
        hits: the Parquet file beside each of them, in any order.
        runs: run -> its trainings, and what its intervals depend on.

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
    return Results(answers, runs)
