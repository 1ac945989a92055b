"""95 % intervals of means by resampling queries."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95


def rate(hits: int, queries: int, *, resamples: int, seed: int) -> dict[str, float]:
    """What the JSON of a stage says of one metric: value and 95 % interval in percent, counts."""
    low, high = interval([hits], [queries], resamples=resamples, seed=seed)
    return {
        "value": 100 * hits / queries,
        "low": 100 * low,
        "high": 100 * high,
        "hits": hits,
        "queries": queries,
    }


def interval(
    hits: Sequence[int], queries: Sequence[int], *, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of the unweighted mean of the hit rates of some benchmarks.

    Args:
        hits: number of hits of each benchmark; one entry for a plain rate.
        queries: number of queries of each benchmark, at least 1.
        resamples: bootstrap resamples.
        seed: of the draws.

    Returns:
        Lower and upper end, in [0, 1].
    """
    values = [np.repeat([0.0, 1.0], [q - h, h])[None] for h, q in zip(hits, queries, strict=True)]
    return mean_interval(values, resamples=resamples, seed=seed)


def mean_interval(
    values: Sequence[NDArray[np.floating]], *, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of the unweighted mean of some measures.

    Args:
        values: (measures, queries) for each set of queries. Measures of the same queries are
            drawn together; different sets of queries independently of one another.
        resamples: bootstrap resamples.
        seed: of the draws.

    Returns:
        Lower and upper end, in the unit of the values.
    """
    generator = np.random.default_rng(seed)
    totals = sum(_resampled(v.sum(axis=0), resamples, generator) for v in values)
    low, high = np.quantile(
        totals / sum(len(v) for v in values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    )
    return float(low), float(high)


def _resampled(
    values: NDArray[np.floating], resamples: int, generator: np.random.Generator
) -> NDArray[np.floating]:
    """Means of n values that are drawn n at a time, with replacement.

    How often each *distinct* value is drawn is multinomial: one such draw instead of n indices
    gives exactly the same law, and hits and misses have two distinct values.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = generator.multinomial(len(values), counts / len(values), size=resamples)
    return draws @ distinct / len(values)
