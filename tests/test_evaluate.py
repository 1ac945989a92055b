"""Evaluation of a tower whose right answers are known, because the texts are its own features."""

import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flame import model, store
from flame.config import Backbone, Bootstrap, EvaluateSettings, Question, Recipe, TrainSettings
from flame.datasets import Sample
from flame.evaluate import evaluate
from flame.features import text_features
from flame.images import ImageReader
from flame.shards import ShardWriter

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


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, Path]:
    """A tower, a data set of 12 images in two classes, and stores of its captions and classes.

    Images 0 to 10 have two captions, whose mean facet less its center is their image's feature;
    11 has none; one caption belongs to no image. Class texts are the features of two images.
    """
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder / "toy", samples_per_shard=5)
    for i in range(IMAGES):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(png, "PNG")
        writer.add(Sample(f"k{i}", png.getvalue(), {}, label="ab"[i % 2]))
    writer.close()

    torch.manual_seed(0)
    tower = model.FlameTower(BACKBONE, RECIPE, DIM).eval()
    tower.centers = {"long": {"what": torch.full((DIM,), 2.0), "where": torch.arange(DIM) / 1.0}}
    settings = TrainSettings(
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
    model.save(tower, folder / "tower", record)

    reader = ImageReader(folder / "toy")
    with torch.inference_mode():
        features = tower.encode_image(reader.load(range(IMAGES), SIZE).float() / 255).numpy()
    # Apart, the facets of a caption point elsewhere than their mean.
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


def run(toy, folder: Path, *questions: Question, batch_size: int = 5) -> dict[str, dict]:
    """Records by benchmark."""
    evaluate(
        toy["tower"],
        [toy["toy"]],
        [toy["long.zarr"], toy["class.zarr"]],
        folder / "m.json",
        folder / "m.parquet",
        EvaluateSettings(run="r", questions=questions, bootstrap=Bootstrap(), version=1),
        batch_size=batch_size,
    )
    return {r["benchmark"]: r for r in json.loads((folder / "m.json").read_text())["records"]}


def test_a_text_vector_is_the_direction_of_the_mean_facet(tmp_path):
    vectors = np.array([[[3.0, 0.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, -5.0]]])
    path = write_store(tmp_path / "0.zarr", "long", ["x", "y"], vectors)
    texts = store.Embeddings.open([path], "toy")
    torch.testing.assert_close(
        text_features(texts, FACETS, {}), torch.tensor([[2 / 5**0.5, 1 / 5**0.5], [0.0, -1.0]])
    )
    centers = {"what": torch.tensor([1.0, 0.0]), "where": torch.tensor([1.0, 0.0])}
    torch.testing.assert_close(
        text_features(texts, FACETS, centers),
        F.normalize(torch.tensor([[1.0, 1.0], [-1.0, -2.5]]), dim=-1),
    )
    torch.testing.assert_close(
        text_features(texts, ["where"], centers)[0], torch.tensor([0.0, 1.0])
    )


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
    assert frame.columns == ["benchmark", "metric", "query", "key", "hit"]
    means = frame.group_by("benchmark", "metric").agg(pl.col("hit").mean() * 100)
    for benchmark, metric, mean in means.iter_rows():
        assert records[benchmark]["metrics"][metric]["value"] == pytest.approx(mean)
    top1 = frame.filter(metric="top1")
    assert top1["key"].to_list() == [f"k{i}" for i in range(IMAGES)]
    assert top1["hit"][:2].all()


def test_runs_repeat_and_batches_change_nothing(toy, tmp_path):
    results = []
    for name, batch_size in (("first", 5), ("second", 5), ("third", 12)):
        (tmp_path / name).mkdir()
        records = run(toy, tmp_path / name, question(), batch_size=batch_size)
        results.append((records, (tmp_path / name / "m.parquet").read_bytes()))
    assert results[0] == results[1] == results[2]


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
