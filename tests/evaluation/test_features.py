"""Features of images and texts: what they average, and that only needed ones are computed."""

import io
from collections import Counter
from multiprocessing import active_children

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
from flame.evaluation import decoding, images
from flame.evaluation.decoding import Decoder
from flame.evaluation.features import Features, encoded_features, text_features
from flame.evaluation.images import backbone_features
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


def write_images(path, seed=0):
    """Four images, each with its text of kind `raw`."""
    rng = np.random.default_rng(seed)
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


def test_vectors_of_some_texts_are_those_among_all(tmp_path):
    """To the bit, so that class texts can be read class by class."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(2100, 2, 24))
    path = write_store(tmp_path / "0.zarr", "d", [f"k{i}" for i in range(2100)], vectors)
    texts = store.Embeddings.open([path], "d")
    whole = text_features(texts, FACETS, {})
    for rows in ([7], range(1000, 1080), [2099, 3, 1500]):
        assert torch.equal(text_features(texts, FACETS, {}, rows), whole[list(rows)])


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
    texts = asked.texts("raw")
    assert texts.keys == ["k2", "k3", "k0", "k1"]
    own = encoded_features(tower, TEXTS[2:] + TEXTS[:2], 4)
    torch.testing.assert_close(texts.features, own)
    torch.testing.assert_close(texts.read([3, 1]), own[[3, 1]])
    with pytest.raises(ValueError, match=r"no captions of kind 'row'.*; known: long, raw"):
        asked.texts("row")
    with pytest.raises(ValueError, match="task 'retrieval' needs texts"):
        asked.texts(None)


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded, by data set."""
    counts = Counter()
    real = ImageReader.load

    def counted(reader, rows, *args):
        counts[reader.root.name] += len(rows)
        return real(reader, rows, *args)

    monkeypatch.setattr(ImageReader, "load", counted)
    return counts


def test_an_image_is_decoded_once_for_all_questions_of_a_job(tmp_path, decoded):
    # As ImageNet in two languages, e has the images of d; the probe needs other features of d.
    folders = [write_images(tmp_path / name, seed) for name, seed in (("d", 0), ("e", 0), ("f", 1))]
    probe = question(benchmark="p", task="probe", captions=None, train="f", facets=())
    questions = [question(), question(benchmark="c", dataset="e"), probe]
    given = Features(flame_tower(), folders, [], 3, "test", questions=questions)
    first, second, third = map(given.asked, questions)
    assert not decoded
    features = first.images().features
    assert second.images().features is features
    assert decoded == {"d": 4}
    assert third.visual("d").features.shape == (4, 96)
    assert decoded == {"d": 4}
    third.visual("f")
    assert first.images().features is features
    assert decoded == {"d": 4, "f": 4}
    with pytest.raises(ValueError, match="no data set 'g'; known: d, e, f"):
        third.visual("g")

    alone = Features(flame_tower(), folders, [], 3, "test")
    assert torch.equal(alone.asked(question()).images().features, features)
    assert torch.equal(alone.asked(probe).visual("d").features, third.visual("d").features)
    assert decoded == {"d": 12, "f": 4}


def test_features_of_the_sets_used_last_are_kept(tmp_path, decoded, monkeypatch):
    folders = [write_images(tmp_path / name, seed) for seed, name in enumerate("de")]
    given = Features(flame_tower(), folders, [], 3, "test")
    d, e = (given.asked(question(dataset=name)) for name in "de")
    monkeypatch.setattr(images, "CACHE_BYTES", 2 * 4 * 8 * 4)
    for asked in (d, e, d, e):
        asked.images()
    assert decoded == {"d": 4, "e": 4}
    monkeypatch.setattr(images, "CACHE_BYTES", 2 * 4 * 8 * 4 - 1)
    d.visual("d")  # which takes the place of the two others
    for asked in (d, e, e):
        asked.images()
    assert decoded == {"d": 12, "e": 8}


def test_workers_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "ITEM", 2)
    folders = [write_images(tmp_path / name, seed) for seed, name in enumerate("de")]
    found = []
    for workers in (0, 2):
        with Decoder(workers) as decoder:
            given = Features(flame_tower(), folders, [], 3, "test", decoder=decoder)
            found.append([given.asked(question(dataset=name)).images().features for name in "ded"])
        assert not active_children()
    assert all(map(torch.equal, *found))


def test_a_store_of_another_width_is_refused(tmp_path):
    path = write_store(tmp_path / "0.zarr", "d", ["k0"], np.ones((1, 2, 4)))
    given = Features(flame_tower(dim=8), [], [path], 3, "test")
    with pytest.raises(ValueError, match="width 8, those of 'd' by 'random' have 4"):
        given.asked(question()).texts("raw")
