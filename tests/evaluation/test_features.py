"""Features of images and texts: what they average, and that only needed ones are computed."""

import io

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import store
from flame.evaluation import features
from flame.evaluation.features import Features, backbone_features, encoded_features, text_features
from flame.study.schema.runs import Backbone, Recipe, TextTower
from flame.study.settings import Question
from flame.towers.clip import ClipTower
from flame.towers.flame import FlameTower

FACETS = ("what", "where")
SIZE = 32
RECIPE = Recipe(epochs=1, batch_size=4, lr=1e-3, weight_decay=0, warmup_steps=0)
TEXTS = ["a cat", "two dogs on a long, long road", "a", "the sun"]


def write_store(path, dataset, keys, vectors):
    """One part of kind `raw` with one data set, of vectors (N, 2, D)."""
    attributes = {"kind": "raw", "facets": dict.fromkeys(FACETS, ""), "part": 0, "parts": 1}
    store.create(path, attributes | {"llm": "random"})
    writer = store.Writer(path, dataset, keys=keys, facets=FACETS, dim=vectors.shape[2])
    for rows in writer.missing():
        writer.write(rows, vectors[rows.start : rows.stop])
    return path


def write_images(path):
    """Four images, each with its text of kind `raw`."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(path, samples_per_shard=3)
    for i, text in enumerate(TEXTS):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(png, "PNG")
        writer.add(Sample(f"k{i}", png.getvalue(), {"raw": [text]}))
    writer.close()
    return path


def flame_tower(timm="test_resnet", dim=8):
    torch.manual_seed(0)
    return FlameTower(Backbone(timm=timm, image_size=SIZE), RECIPE, dim).eval()


def clip_tower():
    torch.manual_seed(0)
    text_tower = TextTower(width=16, layers=2, heads=2, embed_dim=8)
    backbone = Backbone(timm="test_resnet", image_size=SIZE)
    return ClipTower(backbone, RECIPE, text_tower).eval()


def question(**changes):
    values = {"benchmark": "b", "task": "retrieval", "dataset": "d", "captions": "raw"}
    return Question.model_validate(values | {"facets": FACETS} | changes)


def test_a_text_vector_is_the_direction_of_the_mean_facet(tmp_path):
    vectors = np.array([[[3.0, 0.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, -5.0]]])
    path = write_store(tmp_path / "0.zarr", "d", ["x", "y"], vectors)
    texts = store.Embeddings.open([path], "d")
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


def test_a_probe_sees_the_mean_patch_token_before_the_final_norm():
    tower = flame_tower("test_vit")
    torch.nn.init.normal_(tower.visual.norm.weight)
    seen = []
    tower.visual.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    images = torch.rand(3, 3, SIZE, SIZE)
    with torch.inference_mode():
        ours = backbone_features(tower, images)
        tower.encode_image(images)
    # The hook also saw the tokens on their way to the projector: same images, same statistics.
    tokens = seen[1]
    assert tokens.shape[1] == 1 + (SIZE // 16) ** 2
    torch.testing.assert_close(ours, tokens[:, 1:].mean(dim=1))


def test_a_probe_sees_what_a_convolutional_net_hands_to_the_projector():
    tower = flame_tower()
    images = torch.rand(3, 3, SIZE, SIZE)
    with torch.inference_mode():
        torch.testing.assert_close(
            tower.projector(backbone_features(tower, images)), tower.encode_image(images)
        )


def test_own_texts_are_unit_vectors_in_any_batches():
    tower = clip_tower()
    whole = encoded_features(tower, TEXTS, 4)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(4))
    with torch.inference_mode():
        alone = torch.cat([tower.encode_text([text]) for text in TEXTS])
    torch.testing.assert_close(whole, F.normalize(alone, dim=-1))
    torch.testing.assert_close(encoded_features(tower, TEXTS, 3), whole)


def test_own_texts_come_from_the_captions_of_the_kind_in_their_order(tmp_path):
    write_images(tmp_path / "d")
    captions = pl.read_parquet(tmp_path / "d" / "captions.parquet")
    others = captions.with_columns(kind=pl.lit("long"), text=pl.lit("something else"))
    mixed = pl.concat([captions[2:], others, captions[:2]])
    mixed.write_parquet(tmp_path / "d" / "captions.parquet")
    tower = clip_tower()
    asked = Features(tower, [tmp_path / "d"], [], 3, "test").asked(question())
    keys, vectors = asked.texts("raw")
    assert keys == ["k2", "k3", "k0", "k1"]
    torch.testing.assert_close(vectors, encoded_features(tower, TEXTS[2:] + TEXTS[:2], 4))
    with pytest.raises(ValueError, match=r"no captions of kind 'row'.*; known: long, raw"):
        asked.texts("row")
    with pytest.raises(ValueError, match="task 'retrieval' needs texts"):
        asked.texts(None)


def test_only_what_is_asked_for_is_computed_and_only_once(tmp_path, monkeypatch):
    folders = [write_images(tmp_path / name) for name in ("d", "e")]
    passes = []
    real = features.image_features

    def counted(encode, reader, *args, **options):
        passes.append((reader.root.name, getattr(encode, "__name__", "backbone")))
        return real(encode, reader, *args, **options)

    monkeypatch.setattr(features, "image_features", counted)
    given = Features(flame_tower(), folders, [], 3, "test")
    first, second = given.asked(question()), given.asked(question(benchmark="c"))
    assert passes == []
    assert torch.equal(first.images().features, second.images().features)
    assert passes == [("d", "encode_image")]
    for asked in (first, second):
        asked.visual("d")
        asked.visual("e")
    assert passes[1:] == [("d", "backbone"), ("e", "backbone")]
    torch.testing.assert_close(asked.visual("e").features.norm(dim=-1), torch.ones(4))
    with pytest.raises(ValueError, match="no data set 'f'; known: d, e"):
        asked.visual("f")


def test_a_store_of_another_width_is_refused(tmp_path):
    path = write_store(tmp_path / "0.zarr", "d", ["k0"], np.ones((1, 2, 4)))
    given = Features(flame_tower(dim=8), [], [path], 3, "test")
    with pytest.raises(ValueError, match="width 8, those of 'd' by 'random' have 4"):
        given.asked(question()).texts("raw")
