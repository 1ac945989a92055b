"""Few-shot classification: what is drawn, what is said, and words from which an LLM can answer."""

import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from tests.embedding.test_llm import smollm2  # noqa: F401 - the fixture of the real LLM
from transformers import AutoModelForCausalLM

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import checkpoints, store
from flame.evaluation.vocabulary import Speaker
from flame.fewshot import Episode, constrained, draw, fewshot, pictures, say
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
def speaker(llm) -> Speaker:
    speaker = Speaker(llm)
    speaker.model = speaker.model.float()
    return speaker


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


def generated(speaker, checkpoint, prompt: list[int], answers: dict[str, list[int]]) -> str:
    """What `generate` of transformers says where only tokens of the answers are allowed."""
    causal = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    stop = len(speaker.head) - 1  # a token in none of the answers
    assert all(stop not in ids for ids in answers.values())

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        said = ids[len(prompt) :].tolist()
        ahead = [
            a[len(said)] for a in answers.values() if a[: len(said)] == said and len(a) > len(said)
        ]
        return ahead or [stop]

    out = causal.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=40,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    said = out[0, len(prompt) :].tolist()
    return next(name for name, ids in answers.items() if ids == said[: len(ids)])


@pytest.mark.parametrize(
    "names",
    [["hot", "hot dog", "hot tub"], ["horse", "hot", "hot dog", "ape", "app", "zebra"]],
)
def test_constrained_decoding_says_what_generate_says(speaker, llm, names):
    answers = {name: speaker.ids(f" {name}\n") for name in names}
    rng = random.Random(0)
    said = []
    for _ in range(16):
        prompt = speaker.start() + rng.choices(range(1, len(speaker.head)), k=50)
        state, memory = speaker.read(prompt)
        said.append(constrained(speaker, state, memory, answers))
        assert said[-1] == generated(speaker, llm, prompt, answers)
    assert len(set(said)) > 1


def test_a_prompt_repeats_its_examples_and_not_its_query(speaker, llm):
    labels = ["hot dog", "hot", "hot"]
    texts = {0: "red bread", 1: "sun", 2: "fire"}
    episode = Episode(("hot", "hot dog"), (1, 0), 2)
    intro = "Every input is words, every output one of: hot, hot dog.\n"
    context = "Input: sun\nOutput: hot\nInput: red bread\nOutput: hot dog\n"
    answers = {name: speaker.ids(f" {name}\n") for name in episode.classes}
    heard = []

    def listen(ids, memory=None):
        if memory is None:
            heard.clear()
        heard.extend(ids)
        return Speaker.read(speaker, ids, memory)

    listener = type("Listener", (), {"__getattr__": lambda _, name: getattr(speaker, name)})()
    listener.read = listen
    for repeats in (0, 1, 3):
        (alone,) = say(listener, episode, texts, labels, [repeats])
        prompt = speaker.start() + speaker.ids(
            intro + (repeats + 1) * context + "Input: fire\nOutput:"
        )
        assert heard[: len(prompt)] == prompt
        assert alone == generated(speaker, llm, prompt, answers)
        together = say(speaker, episode, texts, labels, [0, 1, 3])
        assert together[(0, 1, 3).index(repeats)] == alone


def test_episodes_are_drawn_as_the_trial_says():
    trial = Trial(ways=3, shots=2, repeats=1)
    drawn = draw(LABELS, trial, 200, seed=0)
    for episode in drawn:
        assert len(set(episode.classes)) == 3
        counts = Counter(LABELS[i] for i in episode.examples)
        assert counts == dict.fromkeys(episode.classes, 2)
        assert len({*episode.examples, episode.query}) == 7
        assert LABELS[episode.query] in episode.classes
    # Of 200 queries a third stands for the first of the names, for the last example's class.
    first = sum(LABELS[e.query] == e.classes[0] for e in drawn)
    last = sum(LABELS[e.query] == LABELS[e.examples[-1]] for e in drawn)
    assert 40 < first < 95
    assert 40 < last < 95
    assert draw(LABELS, Trial(ways=3, shots=2, repeats=3), 200, seed=0) == drawn
    assert draw(LABELS, trial, 200, seed=1) != drawn


def test_too_few_images_for_a_trial_are_told():
    with pytest.raises(ValueError, match=r"2-way 5-shot .* 2 classes of 6 images .* there are 0"):
        draw(LABELS, Trial(ways=2, shots=5, repeats=0), 1, seed=0)
    with pytest.raises(ValueError, match=r"5-way 1-shot .* there are 4"):
        draw(LABELS, Trial(ways=5, shots=1, repeats=0), 1, seed=0)
    with pytest.raises(ValueError, match="no image of the data set has a label"):
        draw([None], Trial(ways=2, shots=1, repeats=0), 1, seed=0)


def test_pictures_are_of_different_classes():
    assert pictures(LABELS, 2) == [0, 10]
    assert pictures(LABELS, 9) == [0, 5, 10, 15]


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
        ({"pool": 9}, "9 x 9 words of a map of 4 x 4 positions"),
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


def test_words_that_are_the_labels_are_learnt_from_examples(smollm2):  # noqa: F811
    """The classification itself works: with SmolLM2, words decide, and wrong ones mislead."""
    classes = ["apple", "guitar", "horse", "truck"]
    labels = [label for label in classes for _ in range(2)]
    speaker = Speaker(smollm2)
    episodes = draw(labels, Trial(ways=4, shots=1, repeats=1), 8, seed=0)
    right = dict(enumerate(labels))
    for episode in episodes:
        (answer,) = say(speaker, episode, right, labels, [1])
        assert answer == labels[episode.query]
        example = {labels[i]: i for i in episode.examples}
        other = next(c for c in classes if c != labels[episode.query])
        wrong = right | {episode.query: right[example[other]]}
        (answer,) = say(speaker, episode, wrong, labels, [1])
        assert answer == other
