"""Values and paired differences of runs, read from the files of their evaluations."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from flame.evaluation.bootstrap import interval
from flame.evaluation.records import query_frame, record
from flame.evaluation.tasks import Answer, Hits
from flame.report import results
from flame.study.schema.benchmarks import Bootstrap
from flame.study.schema.tables import Measure
from flame.study.settings import Question
from tests.answers import counted, write

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)
R1, T1 = Measure(benchmark="COCO", metric="r@1"), Measure(benchmark="food", metric="top1")


def read(folder, runs, **answers):
    files = [write(folder, name.replace("_", "."), given) for name, given in answers.items()]
    return results.read([f[0] for f in files], [f[1] for f in files[::-1]], runs, BOOTSTRAP)


def test_value_is_the_rate_and_its_interval_that_of_the_rate(tmp_path):
    found = read(tmp_path, {"a": ("a",)}, a={"COCO": {"r@1": counted(10, 40)}})
    low, high = interval([10], [40], **BOOTSTRAP.model_dump())
    assert found.rate("a", [R1]) == pytest.approx((25.0, 100 * low, 100 * high, None))


def test_mean_of_measures_is_unweighted_and_so_is_its_interval(tmp_path):
    answers = {"COCO": {"r@1": counted(10, 40)}, "food": {"top1": counted(30, 60)}}
    found = read(tmp_path, {"a": ("a",)}, a=answers).rate("a", [R1, T1])
    low, high = interval([10, 30], [40, 60], **BOOTSTRAP.model_dump())
    assert found == pytest.approx((37.5, 100 * low, 100 * high, None))


def test_metrics_of_the_same_queries_are_drawn_together(tmp_path):
    """One metric hits where the other misses, so the mean of every bootstrap sample is a half."""
    hit, opposite = [1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]
    other = Measure(benchmark="COCO", metric="r@2")
    both = {"COCO": {"r@1": hit, "r@2": opposite}, "food": {"top1": opposite}}
    found = read(tmp_path, {"a": ("a",)}, a=both)
    assert found.rate("a", [R1, other])[:3] == pytest.approx((50.0, 50.0, 50.0))
    apart = found.rate("a", [R1, T1])  # other benchmarks have other queries
    assert apart.low < 50.0 < apart.high


def test_several_trainings_give_their_mean_and_sample_deviation(tmp_path):
    rates = {"a": counted(1, 4), "a_seed1": counted(2, 4), "a_seed2": counted(3, 4)}
    runs = {"a": ("a", "a.seed1", "a.seed2")}
    found = read(tmp_path, runs, **{k: {"COCO": {"r@1": v}} for k, v in rates.items()})
    value, low, high, std = found.rate("a", [R1])
    assert (value, std) == pytest.approx((50.0, 25.0))  # of 25, 50, 75 %
    assert 0.0 <= low < 50.0 < high <= 100.0


def test_a_difference_is_paired(tmp_path):
    """Two runs differ in 4 of 100 queries: the 96 others do not widen the interval."""
    one, other = counted(54, 100), counted(50, 100)
    runs = {"a": ("a",), "b": ("b",)}
    found = read(tmp_path, runs, a={"COCO": {"r@1": one}}, b={"COCO": {"r@1": other}})
    value, low, high, std = found.difference("a", "b", [R1])
    assert (value, std) == (pytest.approx(4.0), None)
    four = interval([4], [100], **BOOTSTRAP.model_dump())  # 4 queries have 1, all others 0
    assert (low, high) == pytest.approx((100 * four[0], 100 * four[1]))
    back = found.difference("b", "a", [R1])
    assert back.value == pytest.approx(-4.0)
    assert back.high <= 0.0


def test_a_difference_of_seeds_is_that_of_their_means_and_spreads_over_pairs(tmp_path):
    rates = {"a": 6, "a_seed1": 8, "b": 4, "b_seed1": 2}
    answers = {name: {"COCO": {"r@1": counted(hits, 10)}} for name, hits in rates.items()}
    runs = {"a": ("a", "a.seed1"), "b": ("b", "b.seed1"), "b-once": ("b",)}
    found = read(tmp_path, runs, **answers)
    paired = found.difference("a", "b", [R1])
    assert paired.value == pytest.approx(40.0)
    assert paired.std == pytest.approx(np.std([20.0, 60.0], ddof=1))
    uneven = found.difference("a", "b-once", [R1])
    assert (uneven.value, uneven.std) == (pytest.approx(30.0), None)


def test_agrees_with_what_evaluate_says_of_the_same_answer(tmp_path):
    hit = torch.arange(60) % 7 == 0
    answer = Answer({"r@1": Hits([f"k{n}" for n in range(60)], hit)}, 60, 60, 0)
    question = Question(benchmark="COCO", task="retrieval", dataset="d")
    told = record("a", question, answer, BOOTSTRAP)
    (tmp_path / "a.json").write_text(json.dumps({"records": [told]}))
    query_frame("COCO", answer).write_parquet(tmp_path / "a.parquet")
    files = [tmp_path / "a.json"], [tmp_path / "a.parquet"]
    found = results.read(*files, {"a": ("a",)}, BOOTSTRAP).rate("a", [R1])
    metric = told["metrics"]["r@1"]
    assert found[:3] == pytest.approx((metric["value"], metric["low"], metric["high"]))


def test_what_was_not_asked_is_named(tmp_path):
    runs = {"a": ("a",), "b": ("b",), "c": ("c",)}
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
    found = read(tmp_path, {"a": ("a", "a.seed1")}, **answers)
    with pytest.raises(ValueError, match="one run have different queries"):
        found.rate("a", [R1])


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    json_file, parquet = write(tmp_path, "a", {"COCO": {"r@1": [1, 0]}})
    with pytest.raises(ValueError, match="no Parquet file beside it"):
        results.read([json_file], [], {}, BOOTSTRAP)
    pl.read_parquet(parquet).with_columns(hit=True).write_parquet(parquet)
    with pytest.raises(ValueError, match=r"2 hits of 2 queries .* says 1 of 2"):
        results.read([json_file], [parquet], {}, BOOTSTRAP)
