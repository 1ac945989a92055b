"""Memory that rules ask for: above what is really allocated, known or measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flame.report import costs, memory_table
from flame.report.extent import Extent
from flame.study import jobs, memory, stages
from flame.study.load import load_file
from flame.study.memory import Machine
from flame.study.schema.runs import Validation
from flame.study.shapes import SHAPES, assumed_shape, tower_shape
from flame.study.study import Study
from tests.workflow import ROOT, TINY, WHOLE

MB, GB = 10**6, 10**9
GPU = Machine(gpus=1, workers=7)
NODE = Machine(gpus=8, workers=7)
IMAGES = {"cc3m": 2_905_954, "yfcc15m": 15_061_521}


@pytest.fixture(scope="module")
def paper() -> Study:
    return load_file(ROOT / "config/paper.yaml", ROOT)


def asked(study: Study, rule: str, machine: Machine = GPU, **wildcards: str) -> float:
    """Bytes that a rule asks for."""
    return memory.request_mb(study, rule, wildcards, machine) * MB


def test_every_job_has_a_formula():
    assert set(memory.FORMULAS) == set(jobs.JOBS)


def test_the_plan_tells_the_memory_of_every_rule():
    extent = Extent(load_file(TINY, ROOT))
    told = memory_table.table(extent).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in told] == [*extent.jobs()]
    asks = memory.request_mb(extent.study, "train", {"run": "flame-9"}, memory_table.NODE)
    (train,) = (line for line in told if "| train |" in line)
    assert f" {asks / 1e3:,.1f} GB " in train


# What is known without measuring: numbers of values, and bytes of each.


def parameters(id: str) -> int:
    """Parameters of an LLM, counted by transformers."""
    shape = SHAPES[id]
    config = AutoConfig.for_model(
        "llama" if "Llama" in id else "mistral",
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        head_dim=shape.head_dim,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocabulary,
    )
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in llm.parameters())


def test_fewshot_holds_its_llm_and_a_head_in_float32(paper):
    nemo, head = parameters("mistralai/Mistral-Nemo-Instruct-2407"), 131_072 * 5120
    where = {"run": "flame-7", "benchmark": "MiniImageNet"}
    assert asked(paper, "fewshot", **where) > 2 * nemo
    assert 4 * (nemo + head) > 51 * GB
    assert asked(paper, "fewshot", Machine(), **where) > 4 * (nemo + head)


def test_the_llm_passes_through_main_memory(paper):
    nemo = parameters("mistralai/Mistral-Nemo-Instruct-2407")
    where = {"llm": "mistral-nemo", "bundle": "yfcc15m", "kind": "long", "part": "0"}
    assert asked(paper, "embed", **where) > 2 * nemo + IMAGES["yfcc15m"] / 120 * 600
    assert asked(paper, "embed", Machine(), **where) > 4 * nemo
    assert asked(paper, "overhead") > 2 * nemo + IMAGES["cc3m"] * (600 + 110 + 80)
    assert asked(paper, "overhead", Machine()) > 4 * nemo


def test_a_training_holds_the_pixels_that_it_is_validated_on(paper):
    chosen = Validation(benchmarks=("ImageNet-1k", "MSCOCO"), images=4000)
    blocks = {name: getattr(paper, name) for name in Study.model_fields}
    validated = Study(**blocks | {"validation": chosen})
    before, after = (asked(study, "train", NODE, run="flame-7") for study in (paper, validated))
    assert after - before > 2 * 4000 * 3 * 224**2


def test_evaluations_hold_the_features_that_they_compare(paper):
    where = {"run": "flame-7", "bundle": paper.bundle("imagenet1k")}
    vectors = 50_000 + 1000  # images and classes
    assert asked(paper, "evaluate", **where) > 4 * 5120 * vectors
    where["bundle"] = paper.bundle("sun397")
    assert asked(paper, "evaluate", **where) > 4 * 5120 * 108_754


def test_a_training_asks_for_every_process_and_worker(paper):
    image, facets = 3 * 224**2, 9 + 1 + 1
    batch = 8192 // 8 * (image + 2 * 5120 * facets)
    keys = IMAGES["yfcc15m"] * 4 * len("123456789012")
    needed = 8 * (batch + keys + 7 * 300 * MB)
    assert asked(paper, "train", NODE, run="large-flame-large") > needed
    more = [asked(paper, "train", Machine(8, workers), run="large-flame") for workers in (0, 7)]
    assert more[1] - more[0] >= 8 * 7 * 300 * MB
    caches = [Machine(8, cache_mb=size) for size in (1000, 500_000)]
    small, large = (asked(paper, "train", machine, run="clip") for machine in caches)
    assert large - small > 8 * 2 * IMAGES["cc3m"] * image


def test_a_download_holds_a_tar_shard(paper):
    assert asked(paper, "download_dataset", dataset="cc3m") > 10_000 * 60_000
    # 7.1 GB are 14,847 images, of which the paper's benchmark takes 5,000.
    assert asked(paper, "download_dataset", dataset="docci") > 5000 * 7.1 * GB / 14_847


def test_a_captioner_holds_its_model(paper):
    where = {"captioner": "minicpm", "dataset": "cc3m", "part": "0"}
    assert asked(paper, "caption", **where) > 2 * 8.54 * GB + 8 * 2**30


@pytest.mark.parametrize("run", ["flame-7", "flame-small", "clip", "clip-large", "long-clip"])
def test_towers_have_their_parameters(paper, run):
    dim = SHAPES["mistralai/Mistral-Nemo-Instruct-2407"].width
    counted = costs.tower_cost(stages.train(paper, run), dim).parameters
    assert tower_shape(paper, run).parameters == pytest.approx(counted, rel=0.02)


def test_an_llm_that_is_not_here_is_rather_too_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = load_file(ROOT / "config/config.yaml", ROOT)
    assert assumed_shape(demo, "gemma-3-270m").parameters > 268_000_000
    assert assumed_shape(load_file(TINY, ROOT), "random-llama").layers == 2


# What is measured: the growth of the resident set between two numbers of rows.

GROWTH = """
import resource, sys
from pathlib import Path

import numpy as np
import polars as pl

small, large = 100_000, 300_000

def hold(rows): ...

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

hold(10)
kept = [hold(small)]
before = peak()
kept = None
kept = hold(large)
print((peak() - before) / (large - small))
"""
HOLD = {
    "WRITTEN_IMAGE": """
from flame.data.datasets import Sample
from flame.data.shards import ShardWriter

small, large = 20_000, 60_000
png = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
                    "0000000a49444154789c6360000000020001" "48afa4710000000049454e44ae426082")

def hold(rows):
    writer = ShardWriter(folder / f"written-{rows}", 10_000)
    for row in range(rows):
        writer.add(Sample(f"{row:012d}", png, {"raw": [f"{row:080d}"]}))
    writer.close()
""",
    "INDEX_ROW": """
from flame.data.images import ImageReader

def hold(rows):
    at = folder / f"index-{rows}"
    at.mkdir()
    zeros = np.zeros(rows, np.int64)
    table = {name: zeros for name in ("shard", "offset", "size", "width", "height", "crc32c")}
    keys = pl.select(key=pl.int_range(rows).cast(pl.String).str.zfill(12))["key"]
    types = {"shard": pl.Int32, "width": pl.Int32, "height": pl.Int32, "crc32c": pl.UInt32}
    frame = pl.DataFrame(table, schema_overrides=types)
    frame.with_columns(key=keys, label=pl.lit(None, pl.String)).write_parquet(at / "index.parquet")
    return ImageReader(at)
""",
    "JOINED_ROW": """
from flame.training.pairs import Pairs

class Keys:
    drawings = 1

    def __init__(self, rows):
        self.keys = pl.select(key=pl.int_range(rows).cast(pl.String).str.zfill(12))["key"]

def hold(rows):
    stores = {kind: Keys(rows) for kind in ("raw", "short", "long")}
    targets = dict.fromkeys(stores, ("scene",))
    return Pairs(Keys(rows), stores, targets, image_size=224, max_skipped=0)
""",
    "TEXT_ROW": """
from flame.data.captions import of_kind

def hold(rows):
    path = folder / f"texts-{rows}.parquet"
    number = pl.int_range(rows).cast(pl.String)
    table = pl.select(key=number.str.zfill(12), kind=pl.lit("raw"), text=number.str.zfill(80))
    table.write_parquet(path)
    del table
    found = of_kind(path, "raw")
    return found, found["text"].to_list()
""",
    "HIT_ROW": """
import json
from flame.evaluation import records

def hold(rows):
    hits, metrics = folder / f"hits-{rows}.parquet", folder / f"hits-{rows}.json"
    number = pl.int_range(rows)
    pl.select(
        benchmark=pl.lit("b"), metric=pl.lit("top1"), query=number,
        key=number.cast(pl.String).str.zfill(12), hit=pl.lit(True), best=pl.lit(None, pl.String),
    ).write_parquet(hits)
    counts = {"top1": {"hits": rows, "queries": rows}}
    metrics.write_text(json.dumps({"records": [{"run": "r", "benchmark": "b", "metrics": counts}]}))
    return records.read(metrics, hits)
""",
}
TEXTS = {
    "WRITTEN_IMAGE": memory.WRITTEN_TEXT + 3 * 80,
    "TEXT_ROW": 2 * 80,
    "JOINED_ROW": 3 * memory.KEY_ROW,
}


@pytest.mark.parametrize("name", HOLD)
def test_rows_take_what_the_formulas_say(tmp_path, name):
    code = GROWTH.replace("def hold(rows): ...", f"folder = Path(sys.argv[1])\n{HOLD[name]}")
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "src")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= memory.MARGIN * (getattr(memory, name) + TEXTS.get(name, 0))


@pytest.mark.parametrize("study", [TINY, WHOLE], ids=["tiny", "whole"])
def test_no_job_of_a_finished_study_used_more_than_it_asked_for(study, request):
    folder: Path = request.getfixturevalue("finished" if study == TINY else "whole")
    loaded, measured = load_file(study, ROOT), {}
    for rule, wildcards, _ in jobs.closure(loaded, jobs.targets(loaded)):
        job = "/".join(wildcards.values()) or rule
        path = folder / "logs" / rule.replace("download_", "download/") / f"{job}.tsv"
        if path.exists():  # rules of seconds have no benchmark
            used = path.read_text().splitlines()[1].split("\t")[2]  # MiB; NA of a job of seconds
            if used != "NA":
                asks = memory.request_mb(loaded, rule, wildcards, Machine())
                measured[rule, job] = float(used) * 2**20 / MB / asks
    assert measured
    assert max(measured.values()) < 1, measured
