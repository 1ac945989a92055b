"""Metrics and hits: what is written is read, and reading them needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import torch

from flame.evaluation import records
from flame.evaluation.tasks import Answer, Hits
from flame.study.schema.benchmarks import Bootstrap, FewShot, Trial
from flame.study.settings import EvaluateSettings, FewShotSettings, Question

SRC = Path(__file__).parents[2] / "src"
BOOTSTRAP = Bootstrap(resamples=100, seed=0)
COLUMNS = ["benchmark", "metric", "query", "key", "hit", "best"]


def write(folder, settings, record, benchmark, answer):
    files = folder / "m.json", folder / "m.parquet"
    frames = [records.query_frame(benchmark, answer)]
    records.write(*files, settings, [record], frames, seconds=1.234, packages=["torch"])
    return files


def test_what_is_written_of_a_question_is_read(tmp_path):
    question = Question(benchmark="COCO", task="retrieval", dataset="d", captions="short")
    hit = torch.tensor([True, False, True])
    answer = Answer({"r@1": Hits(["b", "a", "a"], hit, [4, 2, 3], ["b", "c", "a"])}, 3, 2, 1)
    settings = EvaluateSettings(run="r", questions=(question,), bootstrap=BOOTSTRAP, version=1)
    record = records.record("r", question, answer, BOOTSTRAP)
    files = write(tmp_path, settings, record, "COCO", answer)
    told = json.loads(files[0].read_text())
    assert list(told) == ["settings", "records", "seconds", "versions"]
    assert (told["seconds"], [*told["versions"]]) == (1.2, ["torch"])
    (found,) = told["records"]
    assert [*found] == ["run", *Question.model_fields, "images", "texts", "unjoined", "metrics"]
    assert (found["images"], found["texts"], found["unjoined"]) == (3, 2, 1)
    assert [*found["metrics"]["r@1"]] == ["value", "low", "high", "hits", "queries"]
    assert pl.read_parquet(files[1]).rows() == [
        ("COCO", "r@1", 4, "b", True, "b"),
        ("COCO", "r@1", 2, "a", False, "c"),
        ("COCO", "r@1", 3, "a", True, "a"),
    ]
    read = records.read(*files)
    assert list(read) == [("r", "COCO", "r@1")]
    queries = read["r", "COCO", "r@1"]  # in the order of `query`
    assert (queries.keys, queries.values.tolist()) == (("a", "a", "b"), [0.0, 1.0, 1.0])


def test_what_is_written_of_few_shot_trials_is_read(tmp_path):
    trial = Trial(ways=2, shots=1, repeats=0)
    settings = FewShotSettings(
        run="r", benchmark="Words", name="d (for Words)", dataset="d",
        captions="raw", final_norm=True, seed=0,
        fewshot=FewShot(facet="scene", pool=2, episodes=2, trials=(trial,)),
        bootstrap=BOOTSTRAP, version=1,
    )  # fmt: skip
    hits = Hits(["k3", "k3"], torch.tensor([False, True]), best=["ape", "hot"])
    answer = Answer({trial.metric: hits}, images=5, texts=0, unjoined=0)
    record = records.fewshot_record(settings, answer)
    files = write(tmp_path, settings, record, "Words", answer)
    (found,) = json.loads(files[0].read_text())["records"]
    assert (found["benchmark"], found["name"]) == ("Words", "d (for Words)")
    about = ["run", "benchmark", "name", "task", "dataset", "captions", "images", "metrics"]
    assert [*found] == about
    frame = pl.read_parquet(files[1])
    assert frame.columns == COLUMNS
    assert frame["query"].to_list() == [0, 1]
    assert records.read(*files)["r", "Words", trial.metric].values.tolist() == [0.0, 1.0]


def test_reading_needs_no_torch():
    code = "import flame.evaluation.records, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC).returncode == 0
