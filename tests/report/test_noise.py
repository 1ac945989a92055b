"""Intervals contain the truth as often as they say, and variances agree with textbook formulas."""

import math

import numpy as np
import pytest
from scipy import stats

from flame.report import noise
from flame.report.noise import Sample

TRAINING, QUERY, INTERACTION = 0.05, 0.6, 0.5
QUERIES = 60


def values_of(rng, trainings: int) -> np.ndarray:
    """Results of a run with the mean 0, (trainings, QUERIES)."""
    values = rng.normal(0, TRAINING, (trainings, 1)) + rng.normal(0, QUERY, QUERIES)
    return values + rng.normal(0, INTERACTION, (trainings, QUERIES))


def of(rng, trainings: int) -> Sample:
    """What `noise.sample` makes of them, in less time."""
    values = values_of(rng, trainings)
    totals = values.mean(axis=1)
    scale = math.sqrt(QUERIES / (QUERIES - 1)) / QUERIES
    return Sample(totals, scale * (values - totals[:, None]), np.zeros(QUERIES, dtype=int))


def test_the_shortcut_of_the_simulation_is_what_is_computed():
    short = of(np.random.default_rng(0), 3)
    whole = noise.sample([(range(QUERIES), values_of(np.random.default_rng(0), 3))])
    for ours, theirs in zip(short, whole, strict=True):
        np.testing.assert_allclose(ours, theirs)


@pytest.mark.parametrize("trainings", [1, 2, 3, 5])
def test_intervals_cover_the_truth_in_93_to_97_percent_of_2000_draws(trainings):
    """A difference of two runs, beside two more of their method that are trained three times."""
    rng, hits, draws = np.random.default_rng(trainings), 0, 2000
    for _ in range(draws):
        one, other, *others = (of(rng, n) for n in (trainings, trainings, 3, 3))
        component = noise.trainings([one, other, *others])
        paired = noise.queries(one.of_clusters - other.of_clusters, one.groups)
        value = one.totals.mean() - other.totals.mean()
        found = noise.interval(value, [(paired, 1.0), (component, 2 / trainings)])
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / draws <= 0.97


def test_without_the_chance_in_trainings_intervals_are_too_narrow():
    """So the test above can fail: this is what an interval over queries alone covers."""
    rng, hits, draws = np.random.default_rng(0), 0, 500
    for _ in range(draws):
        one, other = of(rng, 1), of(rng, 1)
        paired = noise.queries(one.of_clusters - other.of_clusters, one.groups)
        found = noise.interval(float(one.totals[0] - other.totals[0]), [(paired, 1.0)])
        hits += found.low <= 0 <= found.high
    assert hits / draws < 0.93


def test_one_metric_of_single_queries_has_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=30)
    sample = noise.sample([(range(30), values[None])])
    found = noise.queries(sample.of_clusters, sample.groups)
    assert math.sqrt(found.variance) == pytest.approx(stats.sem(values))
    assert found.df == pytest.approx(29)
    ours = noise.interval(values.mean(), [(found, 1.0)])
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_two_metrics_of_other_images_are_two_independent_samples():
    """The mean of two means, with Welch's degrees of freedom."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=12), rng.normal(scale=3, size=40)
    sample = noise.sample([(range(12), first[None]), (range(100, 140), second[None])])
    found = noise.queries(sample.of_clusters, sample.groups)
    welch = stats.ttest_ind(first, -second, equal_var=False)
    assert math.sqrt(found.variance) == pytest.approx(
        math.hypot(stats.sem(first), stats.sem(second)) / 2
    )
    assert found.df == pytest.approx(welch.df)


def test_queries_about_one_image_are_one_cluster():
    """Five captions of an image that are hit together are worth one. In general, the formula of
    clustered standard errors (Miller, 2024), up to C/(C-1)."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=20)
    together = noise.sample([(np.repeat(range(20), 5), np.repeat(images, 5)[None])])
    alone = noise.sample([(range(20), images[None])])
    both = [noise.queries(s.of_clusters, s.groups) for s in (together, alone)]
    assert both[0] == pytest.approx(both[1])

    values, keys = rng.normal(size=100), np.repeat(range(20), 5)
    sample = noise.sample([(keys, values[None])])
    rest = values - values.mean()
    pairs = (keys[:, None] == keys) * np.outer(rest, rest)
    expected = pairs.sum() / 100**2 * 20 / 19
    assert noise.queries(sample.of_clusters, sample.groups).variance == pytest.approx(expected)


def test_one_image_in_several_languages_is_one_cluster():
    """Opposite results on the same images cancel; on other images they do not."""
    values = np.random.default_rng(0).normal(size=(1, 15))
    same = noise.sample([(range(15), values), (range(15), -values)])
    other = noise.sample([(range(15), values), (range(15, 30), -values)])
    assert noise.queries(same.of_clusters, same.groups).variance == pytest.approx(0)
    assert noise.queries(other.of_clusters, other.groups).variance > 0


def test_components_are_those_of_a_two_way_analysis_of_variance():
    """Mean squares of trainings and of the rest, of a table without replicates."""
    values = np.random.default_rng(0).normal(size=(4, 25))
    values += np.random.default_rng(1).normal(size=(4, 1))
    rows, columns = values.shape
    sample = noise.sample([(range(columns), values)])
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    of_rest = (rest**2).sum() / ((rows - 1) * (columns - 1))
    of_rows = columns * values.mean(1).var(ddof=1)
    found = noise.trainings([sample])
    assert found.variance == pytest.approx((of_rows - of_rest) / columns)
    assert (found.spread, found.df) == (pytest.approx(of_rows / columns), 3)
    assert noise.interaction(sample) == pytest.approx(of_rest / columns)


def test_variances_of_runs_are_pooled_by_their_degrees_of_freedom():
    def run(*totals):
        return Sample(np.array(totals), np.zeros((len(totals), 1)), np.zeros(1, dtype=int))

    found = noise.trainings([run(1.0, 3.0), run(0.0, 0.0, 6.0), run(5.0)])
    assert found == pytest.approx(((2.0 + 2 * 12.0) / 3, (2.0 + 2 * 12.0) / 3, 3))
    # A single pair of trainings says too little.
    assert noise.trainings([run(1.0, 3.0), run(5.0)]) is None


def test_the_detectable_difference_is_found_with_the_power_it_says():
    """As many standard errors as the t quantiles of 97.5 % and 80 %, the usual 2.8 of many."""
    many = noise.Component(1.0, 1.0, noise.MANY)
    found = noise.interval(0.0, [(many, 1.0)])
    assert found.detectable == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8), rel=1e-4)
    few = noise.interval(0.0, [(noise.Component(1.0, 1.0, 4.0), 1.0)])
    assert few.detectable == pytest.approx(stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4))


def test_satterthwaite_agrees_with_welch():
    """A difference of two means of independent samples."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=5), rng.normal(scale=4, size=9)
    parts = [
        (noise.Component(v.var(ddof=1), v.var(ddof=1), len(v) - 1.0), 1 / len(v))
        for v in (first, second)
    ]
    ours = noise.interval(first.mean() - second.mean(), parts)
    theirs = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
