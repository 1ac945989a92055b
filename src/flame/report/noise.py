"""How far a measured mean would move with other queries and other trainings.

Queries and trainings are crossed random effects: the result of training t on query q is

    y[t, q] = mean + training[t] + query[q] + interaction[t, q].

Queries about one image (its five captions, its caption in fourteen languages) form a cluster; they
are not independent. docs/statistics.md derives the intervals and says where they come from.

Shapes: T trainings of a run, C clusters of queries.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

LEVEL = 0.95
MANY = 1e6  # degrees of freedom at which Student's t is normal
POWER = 0.8  # of the smallest difference that counts as detectable
FEWEST = 2  # degrees of freedom of a variance between trainings; with 1, intervals are too narrow

Array = NDArray[np.floating]


class Sample(NamedTuple):
    """Results of the trainings of one run in the mean of some metrics."""

    totals: Array
    """(T,): the mean."""
    deviations: Array
    """(T, C): what each cluster adds to the mean, above what it adds on average. The squares of a
    row add up to an estimate of the variance of the total over the choice of the clusters."""
    groups: NDArray[np.integer]
    """(C,): clusters with the same number have queries of the same metrics."""

    @property
    def of_clusters(self) -> Array:
        """Mean of the deviations over the trainings, (C,)."""
        return self.deviations.mean(axis=0)


class Component(NamedTuple):
    """An estimated variance."""

    variance: float
    """In the unit of the results, squared; never negative."""
    spread: float
    """Variance estimate whose uncertainty `df` describes: larger where something was subtracted."""
    df: float
    """Degrees of freedom."""


class Interval(NamedTuple):
    """Interval of a value, and what follows from its width."""

    low: float
    high: float
    error: float
    """Standard error."""
    detectable: float
    """Smallest true difference from 0 that would be found with a probability of 80 %."""


def sample(metrics: Iterable[tuple[Sequence[str], Array]]) -> Sample:
    """Results of a run in the unweighted mean of some metrics.

    Args:
        metrics: for each metric, the cluster of each of its queries, and the results (T, queries).
    """
    metrics = list(metrics)
    number = {key: n for n, key in enumerate(dict.fromkeys(k for keys, _ in metrics for k in keys))}
    trainings = len(metrics[0][1])
    totals = np.zeros(trainings)
    deviations = np.zeros((trainings, len(number)))
    member = np.zeros((len(metrics), len(number)), dtype=bool)
    for row, (keys, values) in enumerate(metrics):
        means = values.mean(axis=1, keepdims=True)
        totals += means[:, 0] / len(metrics)
        places = np.array([number[key] for key in keys])
        member[row, places] = True
        clusters = int(member[row].sum())
        # C/(C-1) makes the sum of squares unbiased, as n-1 does for a sample variance.
        scale = math.sqrt(clusters / max(clusters - 1, 1)) / (values.shape[1] * len(metrics))
        for training, rest in enumerate(values - means):
            deviations[training] += scale * np.bincount(places, rest, len(number))
    _, groups = np.unique(np.packbits(member, axis=0), axis=1, return_inverse=True)
    return Sample(totals, deviations, groups.ravel())


def queries(deviations: Array, groups: NDArray[np.integer]) -> Component:
    """Variance of a total over the choice of the clusters of queries.

    Args:
        deviations: (C,), of a run or of the difference of two.
        groups: (C,), of a `Sample`. Each group is a sample of its own.
    """
    squares, counts = np.bincount(groups, deviations**2), np.bincount(groups)
    variance = float(squares.sum())
    parts = [(part, max(count - 1, 1)) for part, count in zip(squares, counts, strict=True)]
    return Component(variance, variance, _satterthwaite(variance, parts))


def trainings(samples: Iterable[Sample]) -> Component | None:
    """Variance of the result of a training, but for its queries, pooled over runs.

    The variance over trainings contains that of the interaction, divided by the number of queries,
    as does the variance over queries. It is subtracted, so that their sum has it once.

    Args:
        samples: runs; those with a single training tell nothing.

    Returns:
        None if there are too few trainings to tell.
    """
    several = [sample for sample in samples if len(sample.totals) > 1]
    df = sum(len(sample.totals) - 1 for sample in several)
    if df < FEWEST:
        return None
    weighted = [(len(s.totals) - 1, np.var(s.totals, ddof=1), interaction(s)) for s in several]
    spread = float(sum(w * variance for w, variance, _ in weighted)) / df
    shared = float(sum(w * part for w, _, part in weighted)) / df
    return Component(max(0.0, spread - shared), spread, df)


def interaction(sample: Sample) -> float:
    """Variance of a training's result that comes from its own choice among the queries.

    Args:
        sample: of at least two trainings.
    """
    rest = sample.deviations - sample.of_clusters
    return float((rest**2).sum()) / (len(rest) - 1)


def interval(value: float, parts: Sequence[tuple[Component, float]]) -> Interval:
    """Two-sided 95 % interval by Student's t, with Satterthwaite's degrees of freedom.

    Args:
        value: its middle.
        parts: variance components, with the factor that each enters with.
    """
    variance = sum(factor * part.variance for part, factor in parts)
    df = _satterthwaite(variance, [(factor * part.spread, part.df) for part, factor in parts])
    error = math.sqrt(variance)
    reach, power = (float(stdtrit(df, share)) for share in ((1 + LEVEL) / 2, POWER))
    return Interval(value - reach * error, value + reach * error, error, (reach + power) * error)


def _satterthwaite(variance: float, parts: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variance estimates (Satterthwaite, 1946)."""
    uncertainty = sum(part**2 / df for part, df in parts if part)
    return max(1.0, variance**2 / uncertainty) if uncertainty and variance else MANY
