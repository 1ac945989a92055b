"""The program `fewshot`: its files agree, and inputs that do not belong together are refused."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import checkpoints, store
from flame.evaluation.vocabulary import Speaker
from flame.fewshot import fewshot
from flame.study.schema.benchmarks import Bootstrap, FewShot, Trial
from flame.study.schema.runs import Backbone, Recipe
from flame.study.settings import FewShotSettings, FlameTraining
from flame.towers.flame import FlameTower
from flame.towers.load import save

SIZE, CLASSES, EACH = 64, ("ape", "hot", "hot dog", "zebra"), 5
TRIALS = (
    Trial(ways=2, shots=1, repeats=3),
    Trial(ways=2, shots=1, repeats=0),
    Trial(ways=3, shots=2, repeats=1),
)
BACKBONE = Backbone(
    timm="resnet10t", image_size=SIZE, args={"channels": [8, 8, 8, 16], "stem_width": 4}
)
LABELS = [label for label in CLASSES for _ in range(EACH)] + [None]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    """A random LLM over bytes whose head is tied to its token embeddings."""
    out = tmp_path_factory.mktemp("llm")
    checkpoints.random("gemma3_text", out)
    return out


@pytest.fixture(scope="module")
def toy(tmp_path_factory, llm) -> dict[str, Path]:
    """A tower, noise in four classes with one image of none, and a store of training captions."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder / "toy", samples_per_shard=8)
    for i, label in enumerate(LABELS):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(png, "PNG")
        writer.add(Sample(f"k{i}", png.getvalue(), {}, label=label))
    writer.close()

    dim = Speaker(llm).dim
    training = FlameTraining(
        run="r",
        seed=0,
        dataset="pairs",
        backbone=BACKBONE,
        recipe=Recipe(
            epochs=1, batch_size=4, lr=1e-3, weight_decay=0, warmup_steps=0, standardize="center"
        ),
        targets={"raw": ("scene",)},
        max_skipped=0,
        version=1,
    )
    torch.manual_seed(0)
    tower = FlameTower(training.backbone, training.recipe, dim).eval()
    tower.centers = {"raw": {"scene": torch.zeros(dim)}}
    (folder / "tower").mkdir()
    record = {"settings": training.model_dump(mode="json"), "dim": dim}
    save(tower, folder / "tower", record)

    attributes = {"kind": "raw", "facets": {"scene": ""}, "part": 0, "parts": 1}
    store.create(folder / "raw.zarr", attributes)
    pairs = store.Writer(
        folder / "raw.zarr", "pairs", keys=list("abcdef"), facets=["scene"], dim=dim
    )
    (rows,) = pairs.missing()
    pairs.write(rows, rng.normal(size=(6, 1, dim)))
    return {"llm": llm} | {name: folder / name for name in ("tower", "toy", "raw.zarr")}


def settings(**changes) -> FewShotSettings:
    asked = {"facet": "scene", "pool": 2, "episodes": 6, "trials": TRIALS, "pictures": 3}
    values = {
        "run": "r",
        "benchmark": "Toy",
        "dataset": "toy",
        "captions": "raw",
        "fewshot": FewShot(**asked | {k: v for k, v in changes.items() if k in asked}),
        "final_norm": True,
        "seed": 0,
        "bootstrap": Bootstrap(),
        "version": 1,
    }
    return FewShotSettings(**values | {k: v for k, v in changes.items() if k in values})


def run(toy, folder: Path, chosen: FewShotSettings, batch_size: int = 4) -> dict:
    folder.mkdir(exist_ok=True)
    fewshot(
        toy["tower"],
        toy["llm"],
        toy["toy"],
        [toy["raw.zarr"]],
        folder / "m.json",
        folder / "m.parquet",
        folder / "words.json",
        chosen,
        batch_size=batch_size,
    )
    (record,) = json.loads((folder / "m.json").read_text())["records"]
    return record


def test_files_tell_the_same_and_repeat(toy, tmp_path):
    record = run(toy, tmp_path / "first", settings())
    assert (record["run"], record["benchmark"]) == ("r", "Toy")
    assert list(record["metrics"]) == [trial.metric for trial in TRIALS]
    frame = pl.read_parquet(tmp_path / "first/m.parquet")
    assert frame.columns == ["benchmark", "metric", "query", "key", "hit", "best"]
    for metric, counted in record["metrics"].items():
        rows = frame.filter(metric=metric, benchmark="Toy")
        assert rows["query"].to_list() == list(range(6))
        assert (rows["hit"].sum(), len(rows)) == (counted["hits"], counted["queries"])
        assert counted["value"] == pytest.approx(100 * counted["hits"] / 6)
        labels = [LABELS[int(key[1:])] for key in rows["key"]]
        assert rows["hit"].to_list() == [a == b for a, b in zip(rows["best"], labels, strict=True)]
        assert set(rows["best"]) <= set(CLASSES)
    once, thrice = (frame.filter(metric=t.metric)["key"].to_list() for t in TRIALS[:2])
    assert once == thrice

    assert run(toy, tmp_path / "second", settings()) == record
    for name in ("m.parquet", "words.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_words_of_pictures_have_a_place_and_a_probability(toy, tmp_path):
    run(toy, tmp_path, settings())
    shown = json.loads((tmp_path / "words.json").read_text())
    assert [(picture["key"], picture["label"]) for picture in shown] == [
        ("k0", "ape"),
        ("k5", "hot"),
        ("k10", "hot dog"),
    ]
    for picture in shown:
        assert np.shape(picture["words"]) == np.shape(picture["probabilities"]) == (4, 4)
        assert all(0 < p <= 1 for line in picture["probabilities"] for p in line)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"final_norm": False}, "final_norm is false"),
        ({"captions": "rwa"}, r"no embeddings of captions of kind 'rwa' \(did you mean 'raw'\?\)"),
        ({"facet": "scenes"}, "no center of raw captions and facet 'scenes'"),
        ({"pool": 9}, "cannot pool 4 x 4 positions to 9 x 9"),
    ],
)
def test_what_does_not_fit_is_refused(toy, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        run(toy, tmp_path, settings(**change))


def test_a_hidden_layer_is_refused(toy, tmp_path):
    hidden = tmp_path / "hidden.zarr"
    shutil.copytree(toy["raw.zarr"], hidden)
    attributes = {"kind": "raw", "facets": {"scene": ""}, "part": 0, "parts": 1}
    store.create(hidden, attributes | {"layer": 1})
    with pytest.raises(ValueError, match="of layer 1: the LLM's head reads the last, 2"):
        run(toy | {"raw.zarr": hidden}, tmp_path / "out", settings())


def test_another_llm_than_that_of_the_captions_does_not_speak(toy, tmp_path):
    other = tmp_path / "raw.zarr"
    facets = {"kind": "raw", "facets": {"scene": ""}, "part": 0, "parts": 1}
    store.create(other, facets | {"llm": "small", "checkpoint": "a" * 64})
    writer = store.Writer(other, "pairs", keys=["a"], facets=["scene"], dim=64)
    writer.write(range(1), np.ones((1, 1, 64)))
    with pytest.raises(ValueError, match=f"{toy['llm']} is not the LLM 'small' that embedded"):
        run(toy | {"raw.zarr": other}, tmp_path / "out", settings())
