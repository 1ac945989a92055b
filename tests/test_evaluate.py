"""Evaluation of a tower with known answers: its texts are its own image features."""

import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flame.data.datasets import Sample
from flame.data.images import ImageReader
from flame.data.shards import ShardWriter
from flame.embedding import store
from flame.evaluate import evaluate
from flame.evaluation.forward import image_features
from flame.study.schema.benchmarks import Bootstrap
from flame.study.schema.runs import Backbone, Recipe, TextTower
from flame.study.settings import ClipTraining, EvaluateSettings, FlameTraining, Question
from flame.towers.flame import FlameTower
from flame.towers.load import create, load, save
from tests.broken import broken_forms, replaced

DIM, SIZE, IMAGES = 8, 32, 12
FACETS = ("what", "where")
BACKBONE = Backbone(timm="test_resnet", image_size=SIZE)
RECIPE = Recipe(
    epochs=1, batch_size=4, lr=1e-3, weight_decay=0, warmup_steps=0, standardize="center"
)


def write_store(path: Path, kind: str, keys: list[str], vectors: np.ndarray) -> Path:
    """One part with one data set, `toy`, of vectors (N, 2, DIM)."""
    attributes = {"kind": kind, "facets": dict.fromkeys(FACETS, ""), "part": 0, "parts": 1}
    store.create(path, attributes | {"llm": "random"})
    writer = store.Writer(path, "toy", keys=keys, facets=FACETS, dim=vectors.shape[2])
    for rows in writer.missing():
        writer.write(rows, vectors[rows.start : rows.stop])
    return path


def write_images(path: Path, rng: np.random.Generator, key, captions=None, lighter=0) -> Path:
    """A data set of noise in two classes; key and captions are formatted with its number.

    Pixels of class b are lighter than those of class a by this much.
    """
    writer = ShardWriter(path, samples_per_shard=5)
    for i in range(IMAGES):
        png = io.BytesIO()
        pixels = rng.integers(0, 256 - lighter, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels + np.uint8(lighter * (i % 2))).save(png, "PNG")
        texts = {kind: [text.format(i)] for kind, text in (captions or {}).items()}
        writer.add(Sample(key(i), png.getvalue(), texts, label="ab"[i % 2]))
    writer.add_classes({"a": ["one"], "b": ["other"]})
    writer.close()
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, Path]:
    """A tower, a data set of 12 images in two classes, and stores of its captions and classes.

    Images 0 to 10 have two captions, whose mean facet less its center is their image's feature;
    11 has none; one caption belongs to no image. Class texts are the features of two images.
    """
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    write_images(folder / "toy", rng, "k{}".format)

    torch.manual_seed(0)
    tower = FlameTower(BACKBONE, RECIPE, DIM).eval()
    tower.centers = {"long": {"what": torch.full((DIM,), 2.0), "where": torch.arange(DIM) / 1.0}}
    settings = FlameTraining(
        run="r",
        seed=0,
        dataset="toy",
        backbone=BACKBONE,
        recipe=RECIPE,
        targets={"long": FACETS},
        max_skipped=0,
        version=1,
    )
    (folder / "tower").mkdir()
    record = {"settings": settings.model_dump(mode="json"), "dim": DIM}
    save(tower, folder / "tower", record)

    reader = ImageReader(folder / "toy")
    with torch.inference_mode():
        features = tower.encode_image(reader.load(range(IMAGES), SIZE).float() / 255).numpy()
    # The facets of a caption point elsewhere than their mean.
    spread = rng.normal(size=features.shape)
    facets = np.stack([features + spread, features - spread], axis=1)
    facets += np.stack([vector.numpy() for vector in tower.centers["long"].values()])
    keys = [f"k{i // 2}" for i in range(2 * IMAGES - 2)]
    captions = np.concatenate([facets[:-1].repeat(2, axis=0), rng.normal(size=(1, 2, DIM))])
    write_store(folder / "long.zarr", "long", [*keys, "stranger"], captions)
    write_store(folder / "class.zarr", "class", ["a", "b"], facets[:2])
    return {name: folder / name for name in ("tower", "toy", "long.zarr", "class.zarr")}


def question(**changes) -> Question:
    values = {
        "benchmark": "Toy",
        "task": "retrieval",
        "dataset": "toy",
        "captions": "long",
        "facets": FACETS,
        "center": "long",
    }
    return Question.model_validate(values | changes)


def run(
    toy, folder: Path, *questions: Question, batch_size: int = 5, precision="float32"
) -> dict[str, dict]:
    """Records by benchmark."""
    evaluate(
        toy["tower"],
        [toy["toy"]],
        folder / "m.json",
        folder / "m.parquet",
        EvaluateSettings(
            run="r", questions=questions, precision=precision, bootstrap=Bootstrap(), version=1
        ),
        (toy["long.zarr"], toy["class.zarr"]),
        batch_size=batch_size,
    )
    return {r["benchmark"]: r for r in json.loads((folder / "m.json").read_text())["records"]}


def test_record_and_log_name_a_stand_in_as_one(toy, tmp_path, caplog):
    caplog.set_level("INFO")
    record = run(toy, tmp_path, question(name="toy (for Toy)"))["Toy"]
    assert record["name"] == "toy (for Toy)"
    assert "toy (for Toy): i2t_r@1 100.0 %" in caplog.text


def test_captions_that_are_the_features_are_all_found(toy, tmp_path):
    record = run(toy, tmp_path, question())["Toy"]
    assert (record["images"], record["texts"], record["unjoined"]) == (11, 22, 2)
    for name, metric in record["metrics"].items():
        queries = 11 if name.startswith("i2t") else 22
        assert metric == {
            "value": 100,
            "low": 100,
            "high": 100,
            "hits": queries,
            "queries": queries,
        }


def test_only_the_facets_asked_for_are_averaged(toy, tmp_path):
    one_facet = run(toy, tmp_path, question(facets=["what"]))["Toy"]
    assert one_facet["metrics"]["t2i_r@1"]["value"] < 100


def test_hits_of_every_query_are_kept(toy, tmp_path):
    zeroshot = question(benchmark="Classes", task="zeroshot", captions="class")
    records = run(toy, tmp_path, question(), zeroshot)
    assert list(records) == ["Toy", "Classes"]
    frame = pl.read_parquet(tmp_path / "m.parquet")
    assert frame.columns == ["benchmark", "metric", "query", "key", "hit", "best"]
    means = frame.group_by("benchmark", "metric").agg(pl.col("hit").mean() * 100)
    for benchmark, metric, mean in means.iter_rows():
        assert records[benchmark]["metrics"][metric]["value"] == pytest.approx(mean)
    top1 = frame.filter(metric="top1")
    assert top1["key"].to_list() == [f"k{i}" for i in range(IMAGES)]
    assert top1["hit"][:2].all()
    assert top1["best"].is_null().all()
    t2i = frame.filter(metric="t2i_r@1")
    assert t2i["query"].to_list() == list(range(22))
    assert (t2i["best"] == t2i["key"]).all()


def test_runs_repeat_and_batches_change_nothing(toy, tmp_path):
    results = []
    for name, batch_size in (("first", 5), ("second", 5), ("third", 12)):
        (tmp_path / name).mkdir()
        records = run(toy, tmp_path / name, question(), batch_size=batch_size)
        results.append((records, (tmp_path / name / "m.parquet").read_bytes()))
    assert results[0] == results[1] == results[2]


def test_bfloat16_moves_features_and_few_hits(toy, tmp_path):
    tower, _ = load(toy["tower"])
    pixels = [ImageReader(toy["toy"]).load(range(IMAGES), SIZE)]
    exact, rounded = (
        image_features([tower.encode_image], pixels, IMAGES, torch.device("cpu"), precision)[0]
        for precision in ("float32", "bfloat16")
    )
    assert 1e-4 < (exact - rounded).abs().max() < 0.05
    assert F.cosine_similarity(exact, rounded).min() > 0.999
    record = run(toy, tmp_path, question(), precision="bfloat16")["Toy"]
    assert record["metrics"]["i2t_r@5"]["value"] == 100
    assert json.loads((tmp_path / "m.json").read_text())["settings"]["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "toys"}, r"no data set 'toys' \(did you mean 'toy'\?\)"),
        ({"captions": "short"}, "no embeddings of captions of kind 'short'; known: long, class"),
        ({"facets": ["who"]}, "facet 'who'"),
        ({"center": "raw"}, "no center of kind 'raw'; known: long"),
        ({"task": "retrievel"}, "unknown task 'retrievel'"),
        ({"captions": "class"}, "benchmark 'Toy': no text belongs to an image"),
        ({"task": "zeroshot"}, "benchmark 'Toy': label of image 'k0' has no class text: 'a'"),
    ],
)
def test_what_is_missing_is_named(toy, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        run(toy, tmp_path, question(**change))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Path]:
    """A CLIP, untrained; images in groups of two, with a true and a false caption; a train set."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(1)
    captions = {"positive": "number {}", "negative": "not {} but more", "copy": "number {}"}
    write_images(folder / "pairs", rng, lambda i: f"g{i // 2}-{i % 2}", captions, 128)
    write_images(folder / "train", rng, "t{}".format, lighter=128)
    settings = ClipTraining(
        method="clip",
        run="c",
        seed=0,
        dataset="train",
        backbone=BACKBONE,
        recipe=RECIPE,
        text_tower=TextTower(width=16, layers=1, heads=2, embed_dim=DIM),
        captions="raw",
        max_skipped=0,
        version=1,
    )
    torch.manual_seed(0)
    tower = create(settings).eval()
    (folder / "tower").mkdir()
    record = {"settings": settings.model_dump(mode="json"), "dim": DIM}
    save(tower, folder / "tower", record)
    return {name: folder / name for name in ("tower", "pairs", "train")}


def run_clip(pairs, folder: Path, *questions: dict) -> tuple[dict[str, dict], pl.DataFrame]:
    """Records by benchmark, and the queries."""
    asked = [Question.model_validate({"dataset": "pairs"} | q) for q in questions]
    evaluate(
        pairs["tower"],
        [pairs["pairs"], pairs["train"]],
        folder / "m.json",
        folder / "m.parquet",
        EvaluateSettings(run="c", questions=asked, bootstrap=Bootstrap(), version=1),
    )
    records = json.loads((folder / "m.json").read_text())["records"]
    return {r["benchmark"]: r for r in records}, pl.read_parquet(folder / "m.parquet")


def test_a_tower_with_a_text_tower_is_asked_every_kind_of_question(pairs, tmp_path):
    compose = {"task": "compose", "captions": "positive"}
    records, frame = run_clip(
        pairs,
        tmp_path,
        {"benchmark": "Found", "task": "retrieval", "captions": "positive"},
        {"benchmark": "Classes", "task": "zeroshot", "captions": "class"},
        {"benchmark": "Groups"} | compose,
        {"benchmark": "Told", "negatives": "negative"} | compose,
        {"benchmark": "Not told", "captions": "negative", "task": "compose"}
        | {"negatives": "positive"},
        {"benchmark": "Same", "negatives": "copy"} | compose,
        {"benchmark": "Probe", "task": "probe", "train": "train"},
    )
    counts = {name: (r["images"], r["texts"], r["unjoined"]) for name, r in records.items()}
    told = dict.fromkeys(("Told", "Not told", "Same"), (12, 24, 0))
    assert counts == told | {
        "Found": (12, 12, 0),
        "Classes": (12, 2, 0),
        "Groups": (12, 12, 0),
        "Probe": (12, 0, 0),
    }
    value = {name: {m: v["value"] for m, v in r["metrics"].items()} for name, r in records.items()}
    # One of two captions is nearer, whichever is called the true one; of equal ones the first is.
    assert value["Told"]["accuracy"] + value["Not told"]["accuracy"] == pytest.approx(100)
    assert value["Same"]["accuracy"] == 100
    # The classifier tells dark from light in images that it was not trained on.
    assert value["Probe"]["accuracy"] == 100
    assert frame.filter(benchmark="Groups", metric="group_score")["key"].to_list() == [
        f"g{i}" for i in range(6)
    ]

    tower, _ = load(pairs["tower"])
    reader = ImageReader(pairs["pairs"])
    with torch.inference_mode():
        images = tower.encode_image(reader.load(range(IMAGES), SIZE).float() / 255)
        texts = tower.encode_text([f"number {i}" for i in range(IMAGES)])
    best = (F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T).argmax(dim=1)
    found = frame.filter(benchmark="Found", metric="t2i_r@1")
    assert found["best"].to_list() == [reader.keys[i] for i in best.tolist()]
    assert found["hit"].to_list() == (best == torch.arange(IMAGES)).tolist()


def test_a_probe_of_other_classes_is_refused(pairs, tmp_path):
    other = write_images(tmp_path / "train", np.random.default_rng(2), "t{}".format)
    index = pl.read_parquet(other / "index.parquet")
    index.with_columns(label=pl.col("label") + "s").write_parquet(other / "index.parquet")
    probe = {"benchmark": "Probe", "task": "probe", "train": "train"}
    said = "benchmark 'Probe': label of image 'g0-0' is not trained: 'a'.*; known: as, bs"
    with pytest.raises(ValueError, match=said):
        run_clip(pairs | {"train": other}, tmp_path, probe)


@pytest.mark.parametrize("name", ["model.safetensors", "run.json"])
def test_a_broken_tower_is_named(toy, name):
    file = toy["tower"] / name
    for data in broken_forms(file):
        with replaced(file, data), pytest.raises((ValueError, OSError)) as caught:
            load(toy["tower"])
        assert str(file) in str(caught.value), data
    load(toy["tower"])
