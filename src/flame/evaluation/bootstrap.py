"""95 % bootstrap intervals of means over queries.

`scipy.stats.bootstrap` draws an index per query and resample. Timed in turn in one process, it
takes 13 times as long for a rate of 500 queries and 445 times for one of 50,000, and its draws
would change printed numbers; it serves as the reference in the tests.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95


def rate(hits: int, queries: int, *, resamples: int, seed: int) -> dict[str, float]:
    """One metric as in the results JSON: value and 95 % interval in percent, and counts."""
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
    """Percentile bootstrap interval of the unweighted mean of hit rates.

    Args:
        hits: number of hits of each benchmark; one entry for a single rate.
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
    """Percentile bootstrap interval of the unweighted mean of measures.

    Args:
        values: (measures, queries) for each set of queries. Measures of the same queries are
            resampled together, different sets of queries independently.
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
    """Means of resamples, with replacement, of n values.

    The counts of the *distinct* values in a resample are multinomial, so one multinomial draw has
    exactly the distribution of n drawn indices; hits and misses are two distinct values.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = generator.multinomial(len(values), counts / len(values), size=resamples)
    return draws @ distinct / len(values)
