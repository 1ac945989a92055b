"""The program `overhead` writes seconds and ratios of all ways."""

import json

import torch

from flame.evaluation.overhead import ratios
from flame.overhead import overhead
from tests.evaluation import test_overhead
from tests.evaluation.test_overhead import settings

inputs = test_overhead.inputs


def test_the_stage_writes_seconds_and_ratios_of_all_ways(inputs, tmp_path):
    images, llm, stores = inputs
    out = tmp_path / "overhead.json"
    # One epoch has 3 steps; 1 + 3 rounds of 2 steps need more.
    overhead(images, llm, stores, out, settings(), threads=1)
    result = json.loads(out.read_text())
    assert list(result["seconds"]) == [
        "separate",
        "one_pass",
        "everything",
        "flame",
        "clip",
        "online",
    ]
    assert all(len(each) == 3 and min(each) > 0 for each in result["seconds"].values())
    assert result["ratios"] == ratios(result["seconds"])
    assert result["captions"] == 5
    assert result["steps"] == {"flame": 2, "clip": 2, "online": 1}
    assert "1 thread, LLM in" in result["device"]
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
