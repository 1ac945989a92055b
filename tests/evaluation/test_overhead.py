"""All ways that are timed do the same work, and ratios are taken within a round."""

import json
from io import BytesIO

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embed import embed
from flame.embedding import checkpoints
from flame.embedding.llm import AS_PUBLISHED, FrozenLLM
from flame.embedding.store import Embeddings
from flame.evaluation import overhead, steps
from flame.evaluation.overhead import PlainLLM, embedding_ways, in_turn, ratios
from flame.evaluation.steps import OnlineTexts
from flame.study.settings import ClipTraining, EmbedSettings, FlameTraining, OverheadSettings

IMAGES, SIZE = 12, 16
FACETS = {"category": " the category:", "mood": " the mood, or atmosphere:", "scene": " all of it:"}
WORDS = ["a", "red", "apple", "on", "the", "table", "of", "some", "large", "and", "old", "kitchen"]


def embed_settings(kind="long", **changes):
    plain = {
        "kind": kind,
        "datasets": ("dots",),
        "part": 0,
        "parts": 1,
        "llm": "tiny",
        "layer": "last",
        "final_norm": True,
        "positions": "restart",
        "max_caption_tokens": 24,
        "cleanup": "none",
        "storage": "float16",
        "prefix": ('Description: "', '". In one word,'),
        "facets": FACETS,
        "version": 1,
    }
    return EmbedSettings(**(plain | changes))


def settings(**baseline):
    recipe = {
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "standardize": "center",
        "precision": "float32",
    }
    shared = {
        "seed": 0,
        "dataset": "dots",
        "backbone": {
            "timm": "resnet10t",
            "image_size": SIZE,
            "args": {"channels": [8, 8, 16, 16], "stem_width": 4},
        },
        "max_skipped": 0.0,
        "version": 1,
    }
    targets = {"long": ("category", "scene"), "raw": ("mood",)}
    tower = {"width": 16, "layers": 1, "heads": 2, "context_length": 12, "embed_dim": 8}
    return OverheadSettings(
        overhead={"run": "flame", "baseline": "clip", "captions": 5, "steps": 2, "rounds": 3},
        flame=FlameTraining(run="flame", recipe=recipe, targets=targets, **shared),
        clip=ClipTraining(
            method="clip",
            run="clip",
            captions="raw",
            text_tower=tower,
            recipe=recipe | baseline,
            **shared,
        ),
        embedding=embed_settings(),
        version=1,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders of twelve images with captions and of a random LLM, and the stores of two kinds."""
    root = tmp_path_factory.mktemp("overhead")
    rng = np.random.default_rng(0)
    writer = ShardWriter(root / "dots", samples_per_shard=20)
    for i in range(IMAGES):
        data = BytesIO()
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data, "PNG")
        captions = {"long": [" ".join(WORDS[i % 5 :])], "raw": [f"caption {i}", "another"]}
        writer.add(Sample(key=f"dot-{i}", image=data.getvalue(), captions=captions))
    (root / "dots" / "manifest.json").write_text(json.dumps(writer.close()))
    checkpoints.random("llama", root / "tiny", layers=2)
    stores = []
    for kind in ("long", "raw"):
        stores.append(root / kind / "0.zarr")
        embed(root / "tiny", [root / "dots"], stores[-1], embed_settings(kind), threads=1)
    return root / "dots", root / "tiny", stores


def encoder(llm, **options):
    return FrozenLLM(llm, AS_PUBLISHED.model_copy(update=options), dtype="float32", device="cpu")


@pytest.mark.parametrize("positions", ["restart", "running"])
@pytest.mark.parametrize(("layer", "final_norm"), [("last", True), (1, False)])
def test_the_plain_llm_embeds_what_the_frozen_one_does(inputs, positions, layer, final_norm):
    frozen = encoder(inputs[1], layer=layer, final_norm=final_norm, positions=positions)
    plain = PlainLLM(frozen)
    texts, suffixes = ["a dog", " ".join(WORDS), ""], [*FACETS.values()]
    prefix = embed_settings().prefix
    torch.testing.assert_close(
        plain.embed(texts, prefix, suffixes),
        frozen.embed(texts, prefix, suffixes),
        atol=1e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        plain.embed(texts, prefix, suffixes, [[2, 0], [1]]),
        frozen.embed(texts, prefix, suffixes),
        atol=1e-5,
        rtol=1e-4,
    )
    # One suffix is a text of its own, with the LLM's own mask and positions.
    torch.testing.assert_close(
        plain.embed(texts, prefix, suffixes[1:2]),
        frozen.embed(texts, prefix, suffixes[1:2]),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_plain_llm_is_that_of_transformers_but_holds_no_weights_of_its_own(inputs):
    frozen = encoder(inputs[1])
    plain = PlainLLM(frozen)
    theirs = AutoModel.from_pretrained(inputs[1], dtype=torch.float32).eval()
    ids = torch.tensor([frozen.prefixes([" ".join(WORDS)], ("", ""))[0]])
    with torch.inference_mode():
        states = [model(ids).last_hidden_state for model in (plain.model, theirs)]
    torch.testing.assert_close(*states)
    own = {parameter.data_ptr() for parameter in frozen.model.parameters()}
    assert {parameter.data_ptr() for parameter in plain.model.parameters()} == own


def test_ways_that_differ_are_not_timed(inputs, monkeypatch):
    frozen = encoder(inputs[1], max_caption_tokens=24)
    ways = embedding_ways(frozen, ["a dog", "a cat"], embed_settings())
    assert {name: way.units for name, way in ways.items()} == {
        "separate": 2,
        "one_pass": 2,
        "everything": 2,
    }
    # A mask under which facets see each other.
    monkeypatch.setattr(
        overhead, "facet_mask", lambda p, n: torch.ones(p + sum(n), p + sum(n)).tril().bool()
    )
    with pytest.raises(ValueError, match="'one_pass' and 'everything' differ: cosine"):
        embedding_ways(frozen, ["a dog", "a cat"], embed_settings())


def test_online_texts_are_those_of_the_store(inputs):
    images, llm, stores = inputs
    store = Embeddings.open(stores[:1], "dots")
    online = OnlineTexts(FrozenLLM(llm, embed_settings(), device="cpu"), store, images)
    assert online.keys.equals(store.keys)
    rows, facets = np.array([7, 0, 7]), ["scene", "category"]
    np.testing.assert_allclose(
        online.rows(rows, facets), store.rows(rows, facets), atol=0.05, rtol=0.05
    )


def test_ways_take_turns():
    order = []
    ways = {name: overhead.Way(lambda name=name: order.append(name), 1) for name in "abc"}
    seconds = in_turn(ways, rounds=2)
    assert order == [*"abcabc"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_seconds_are_those_of_a_unit(monkeypatch):
    clock = iter([0.0, 6.0, 10.0, 18.0])
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))
    assert in_turn({"a": overhead.Way(lambda: None, 2)}, rounds=2) == {"a": [3.0, 4.0]}


def test_ratios_are_taken_within_a_round():
    seconds = {
        "separate": [8.0, 4.0, 6.0],
        "one_pass": [4.0, 4.0, 2.0],
        "everything": [2.0, 4.0, 2.0],
        "flame": [1.0, 1.0, 1.0],
        "clip": [0.5, 2.0, 1.0],
        "online": [9.0, 7.0, 8.0],
    }
    assert ratios(seconds) == {
        "separate/one_pass": {"value": 2.0, "low": 1.0, "high": 3.0},
        "separate/everything": {"value": 3.0, "low": 1.0, "high": 4.0},
        "clip/flame": {"value": 1.0, "low": 0.5, "high": 2.0},
        "online/flame": {"value": 8.0, "low": 7.0, "high": 9.0},
    }


def test_steps_of_different_sizes_are_not_compared(inputs):
    images, llm, stores = inputs
    with pytest.raises(ValueError, match="steps of 4 and 6 images are not comparable"):
        steps.runs(images, stores, encoder(llm), settings(batch_size=6))


def test_captions_of_another_kind_are_asked_for_in_vain(inputs):
    assert len(pl.read_parquet(inputs[0] / "captions.parquet")) == 3 * IMAGES
    with pytest.raises(ValueError, match="no captions of kind 'short'; known: long, raw"):
        overhead.captions_of(inputs[0], embed_settings("short"))
