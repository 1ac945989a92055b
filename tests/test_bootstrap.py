"""Intervals agree with resampling done by hand, with scipy, and with the normal approximation."""

import numpy as np
import pytest
from scipy import stats

from flame.bootstrap import interval


def test_equals_resampling_query_by_query():
    rng = np.random.default_rng(1)
    hits = [rng.random(n) < rate for n, rate in ((200, 0.4), (90, 0.7))]
    means = [
        np.mean([rng.choice(h, len(h)).mean() for h in hits]) for _ in range(20_000)
    ]  # brute force: an unweighted mean of two benchmarks
    ours = interval([h.sum() for h in hits], [len(h) for h in hits], resamples=20_000, seed=0)
    assert ours == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.003)


def test_equals_scipy():
    hits = np.arange(500) < 310
    theirs = stats.bootstrap(
        (hits,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert interval([310], [500], resamples=20_000, seed=0) == pytest.approx(theirs, abs=0.003)


def test_width_is_that_of_the_normal_approximation():
    low, high = interval([6000], [10_000], resamples=50_000, seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.6 * 0.4 / 10_000), rel=0.02)


def test_is_a_function_of_its_seed_and_knows_no_doubt_without_misses():
    assert interval([3], [9], resamples=100, seed=4) == interval([3], [9], resamples=100, seed=4)
    assert interval([9], [9], resamples=100, seed=0) == (1.0, 1.0)
