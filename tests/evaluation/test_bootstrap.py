"""Intervals agree with resampling done by hand, with scipy, and with the normal approximation."""

import numpy as np
import pytest
from scipy import stats

from flame.evaluation.bootstrap import interval, mean_interval


def naive(values, resamples: int):
    """Query by query: indices drawn for each set of queries, shared by the measures of the set."""
    rng = np.random.default_rng(1)
    means = []
    for _ in range(resamples):
        drawn = [v[:, rng.integers(0, v.shape[1], v.shape[1])] for v in values]
        means.append(np.mean([mean for v in drawn for mean in v.mean(axis=1)]))
    return np.quantile(means, [0.025, 0.975])


def test_equals_resampling_query_by_query():
    rng = np.random.default_rng(1)
    hits = [rng.random(n) < rate for n, rate in ((200, 0.4), (90, 0.7))]
    ours = interval([h.sum() for h in hits], [len(h) for h in hits], resamples=20_000, seed=0)
    assert ours == pytest.approx(naive([h[None] for h in hits], 20_000), abs=0.003)


def test_values_with_many_levels_equal_resampling_query_by_query():
    rng = np.random.default_rng(2)
    values = [rng.integers(-3, 4, (1, 150)) / 3, rng.random((1, 60))]
    ours = mean_interval(values, resamples=20_000, seed=0)
    assert ours == pytest.approx(naive(values, 20_000), abs=0.006)


def test_measures_of_the_same_queries_are_drawn_together():
    hit = (np.random.default_rng(3).random(300) < 0.5).astype(float)
    same, opposite = np.stack([hit, hit]), np.stack([hit, 1 - hit])
    alone = mean_interval([hit[None]], resamples=5000, seed=0)
    assert mean_interval([same], resamples=5000, seed=0) == pytest.approx(alone)
    assert mean_interval([opposite], resamples=5000, seed=0) == (0.5, 0.5)
    assert mean_interval([same], resamples=20_000, seed=0) == pytest.approx(
        naive([same], 20_000), abs=0.003
    )


def test_equals_scipy_for_a_rate():
    hits = np.arange(500) < 310
    theirs = stats.bootstrap(
        (hits,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert interval([310], [500], resamples=20_000, seed=0) == pytest.approx(theirs, abs=0.003)


def test_a_paired_difference_equals_scipy():
    rng = np.random.default_rng(4)
    one = rng.random(400) < 0.6
    other = np.where(rng.random(400) < 0.8, one, rng.random(400) < 0.4)
    theirs = stats.bootstrap(
        (one.astype(float), other.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    difference = (one.astype(float) - other)[None]
    ours = mean_interval([difference], resamples=20_000, seed=0)
    assert ours == pytest.approx(theirs, abs=0.004)


def test_width_is_that_of_the_normal_approximation():
    low, high = interval([6000], [10_000], resamples=50_000, seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.6 * 0.4 / 10_000), rel=0.02)


def test_is_a_function_of_its_seed_and_knows_no_doubt_without_misses():
    assert interval([3], [9], resamples=100, seed=4) == interval([3], [9], resamples=100, seed=4)
    assert interval([3], [9], resamples=100, seed=4) != interval([3], [9], resamples=100, seed=5)
    assert interval([9], [9], resamples=100, seed=0) == (1.0, 1.0)
