"""Values and paired differences of runs, read from the files of their evaluations."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from flame.evaluation.records import query_frame, record
from flame.evaluation.tasks import Answer, Hits
from flame.report import results
from flame.study.schema.benchmarks import Bootstrap
from flame.study.schema.tables import Measure
from flame.study.settings import Compared, Question
from tests.answers import counted, write

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)
R1, T1 = Measure(benchmark="COCO", metric="r@1"), Measure(benchmark="food", metric="top1")


def compared(*trainings, method="flame", drawn=False):
    return Compared(trainings=trainings, method=method, drawn=drawn)


def single(*runs):
    """Runs that were trained once, or not here."""
    return {run: compared(run, method=None) for run in runs}


def read(folder, runs, **answers):
    files = [write(folder, name.replace("_", "."), given) for name, given in answers.items()]
    return results.read([f[0] for f in files], [f[1] for f in files[::-1]], runs)


def percent(hits, queries):
    """95 % interval of a rate in percent, by scipy."""
    hit = 100 * np.array(counted(hits, queries))
    return (hit.mean(), *stats.ttest_1samp(hit, 0).confidence_interval())


def test_value_is_the_rate_and_its_interval_that_of_a_mean(tmp_path):
    found = read(tmp_path, single("a"), a={"COCO": {"r@1": counted(10, 40)}}).rate("a", [R1])
    assert found[:3] == pytest.approx(percent(10, 40))
    assert (found.std, found.trainings) == (None, True)  # it was not trained here


def test_mean_of_measures_is_unweighted_and_so_is_its_interval(tmp_path):
    answers = {"COCO": {"r@1": counted(10, 40)}, "food": {"top1": counted(30, 60)}}
    found = read(tmp_path, single("a"), a=answers).rate("a", [R1, T1])
    first, second = (np.array(counted(*c)) for c in ((10, 40), (30, 60)))
    welch = stats.ttest_ind(first, -second, equal_var=False).confidence_interval()
    assert found[:3] == pytest.approx((37.5, 50 * welch.low, 50 * welch.high))


def test_queries_about_the_same_image_count_as_one(tmp_path):
    """Where one metric hits the other misses, so their mean is a half whatever the images are."""
    hit, opposite = [1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]
    other = Measure(benchmark="COCO", metric="r@2")
    both = {"COCO": {"r@1": hit, "r@2": opposite}, "German COCO": {"r@1": opposite}}
    found = read(tmp_path, single("a"), a=both | {"food": {"top1": [*opposite, 0]}})
    assert found.rate("a", [R1, other])[:3] == pytest.approx((50.0, 50.0, 50.0))
    german = Measure(benchmark="German COCO", metric="r@1")  # the same images
    assert found.rate("a", [R1, german])[:3] == pytest.approx((50.0, 50.0, 50.0))
    apart = found.rate("a", [R1, T1])  # other images
    assert apart.low < apart.value < apart.high


def test_several_trainings_give_their_mean_and_sample_deviation(tmp_path):
    rates = {"a": counted(1, 4), "a_seed1": counted(2, 4), "a_seed2": counted(3, 4)}
    runs = {"a": compared("a", "a.seed1", "a.seed2")}
    found = read(tmp_path, runs, **{k: {"COCO": {"r@1": v}} for k, v in rates.items()})
    estimate = found.rate("a", [R1])
    assert (estimate.value, estimate.std) == pytest.approx((50.0, 25.0))  # of 25, 50, 75 %
    assert 0.0 <= estimate.low < 50.0 < estimate.high <= 100.0


def test_a_difference_is_paired(tmp_path):
    """Two runs differ in 4 of 100 queries: the 96 others do not widen the interval."""
    one, other = counted(54, 100), counted(50, 100)
    found = read(tmp_path, single("a", "b"), a={"COCO": {"r@1": one}}, b={"COCO": {"r@1": other}})
    paired = found.difference("a", "b", [R1])
    theirs = stats.ttest_rel(one, other).confidence_interval()
    assert paired[:3] == pytest.approx((4.0, 100 * theirs.low, 100 * theirs.high))
    assert paired.std is None
    back = found.difference("b", "a", [R1])
    assert back[:3] == pytest.approx((-4.0, -paired.high, -paired.low))


def test_a_difference_of_seeds_is_that_of_their_means_and_spreads_over_pairs(tmp_path):
    rates = {"a": 6, "a_seed1": 8, "b": 4, "b_seed1": 2}
    answers = {name: {"COCO": {"r@1": counted(hits, 10)}} for name, hits in rates.items()}
    runs = {"a": compared("a", "a.seed1"), "b": compared("b", "b.seed1"), "b-once": compared("b")}
    found = read(tmp_path, runs, **answers)
    paired = found.difference("a", "b", [R1])
    assert paired.value == pytest.approx(40.0)
    assert paired.std == pytest.approx(np.std([20.0, 60.0], ddof=1))
    uneven = found.difference("a", "b-once", [R1])
    assert (uneven.value, uneven.std) == (pytest.approx(30.0), None)


def spread(folder, once, **kinds):
    """Interval of a run trained once, beside two runs whose trainings hit 30 to 50 of 100."""
    hits = {"once": 40, "a": 30, "a_seed1": 50, "b": 32, "b_seed1": 48}
    runs = {
        "once": compared("once", **once),
        "a": compared("a", "a.seed1", **kinds),
        "b": compared("b", "b.seed1", **kinds),
    }
    answers = {name: {"COCO": {"r@1": counted(n, 100)}} for name, n in hits.items()}
    return read(folder, runs, **answers).rate("once", [R1])


def test_a_run_that_is_trained_once_borrows_the_noise_of_its_kind(tmp_path):
    alone = spread(tmp_path, {"method": None})
    borrowed = spread(tmp_path, {})
    assert alone.trainings
    assert borrowed.trainings
    # Trainings differ by 14.1 and 11.3 points, so by 12.8 in root mean square.
    assert borrowed.high - 40 > 1.9 * 12.8 > alone.high - 40
    for other in ({"method": "clip"}, {"drawn": True}):
        missing = spread(tmp_path, other)
        assert not missing.trainings
        assert missing[:3] == pytest.approx(alone[:3])


def test_two_trainings_alone_tell_too_little(tmp_path):
    answers = {name: {"COCO": {"r@1": counted(n, 100)}} for name, n in (("a", 30), ("a_seed1", 50))}
    runs = {"a": compared("a", "a.seed1")}
    assert not read(tmp_path, runs, **answers).rate("a", [R1]).trainings


def test_agrees_with_what_evaluate_says_of_the_same_answer(tmp_path):
    """Value and counts are the same; its interval is a bootstrap over the same queries."""
    hit = torch.arange(600) % 7 == 0
    answer = Answer({"r@1": Hits([f"k{n}" for n in range(600)], hit)}, 600, 600, 0)
    question = Question(benchmark="COCO", task="retrieval", dataset="d")
    told = record("a", question, answer, BOOTSTRAP)
    (tmp_path / "a.json").write_text(json.dumps({"records": [told]}))
    query_frame("COCO", answer).write_parquet(tmp_path / "a.parquet")
    files = [tmp_path / "a.json"], [tmp_path / "a.parquet"]
    found = results.read(*files, single("a")).rate("a", [R1])
    metric = told["metrics"]["r@1"]
    assert found.value == pytest.approx(metric["value"])
    assert found[1:3] == pytest.approx((metric["low"], metric["high"]), abs=0.3)


def test_what_was_not_asked_is_named(tmp_path):
    runs = single("a", "b", "c")
    answers = {"a": {"COCO": {"r@1": [1, 0]}}, "b": {"COCO": {"r@1": [1, 0, 0]}}}
    found = read(tmp_path, runs, **answers)
    for run, measure, said in (
        ("flame", R1, "no trainings of run 'flame'; known: a, b, c"),
        ("c", R1, r"no metrics of run and benchmark \('c', 'COCO'\)"),
        ("a", T1, r"no metrics of run and benchmark \('a', 'food'\)"),
        ("a", Measure(benchmark="COCO", metric="r@2"), "'COCO' has no metric 'r@2'.*known: r@1"),
    ):
        with pytest.raises(ValueError, match=said):
            found.rate(run, [measure])
    with pytest.raises(ValueError, match="'a' and 'b' have different queries"):
        found.difference("a", "b", [R1])


def test_seeds_that_were_asked_other_queries_are_refused(tmp_path):
    answers = {"a": {"COCO": {"r@1": [1, 0]}}, "a_seed1": {"COCO": {"r@1": [1, 0, 0]}}}
    found = read(tmp_path, {"a": compared("a", "a.seed1")}, **answers)
    with pytest.raises(ValueError, match="one run have different queries"):
        found.rate("a", [R1])


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    json_file, parquet = write(tmp_path, "a", {"COCO": {"r@1": [1, 0]}})
    with pytest.raises(ValueError, match="no Parquet file beside it"):
        results.read([json_file], [], {})
    pl.read_parquet(parquet).with_columns(hit=True).write_parquet(parquet)
    with pytest.raises(ValueError, match=r"2 hits of 2 queries .* says 1 of 2"):
        results.read([json_file], [parquet], {})
