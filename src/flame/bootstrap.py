"""95 % intervals of rates by resampling queries."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95


def interval(
    hits: Sequence[int], queries: Sequence[int], *, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of the unweighted mean of the hit rates of some benchmarks.

    Drawing n queries with replacement, of which h are hits, gives a Binomial(n, h / n) number of
    hits. So a resample is one binomial draw per benchmark, exactly, instead of n indices.
    Benchmarks are resampled independently of one another.

    Args:
        hits: number of hits of each benchmark; one entry for a plain rate.
        queries: number of queries of each benchmark, at least 1.
        resamples: bootstrap resamples.
        seed: of the draws.

    Returns:
        Lower and upper end, in [0, 1].
    """
    num_queries = np.asarray(queries)
    rates = np.asarray(hits) / num_queries
    draws = np.random.default_rng(seed).binomial(num_queries, rates, (resamples, len(rates)))
    means = (draws / num_queries).mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
