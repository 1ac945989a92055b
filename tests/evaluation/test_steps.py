"""Training steps that are timed read nothing, and differ in what is compared only."""

import numpy as np
import pytest
import torch

from flame.data import reading
from flame.embedding import store
from flame.embedding.llm import FrozenLLM
from flame.evaluation import steps
from flame.study.schema.runs import Backbone
from flame.training import tokens
from flame.training.processes import Place
from flame.training.speed import DEFAULT, Speed
from tests.evaluation import test_overhead
from tests.evaluation.test_overhead import settings

inputs = test_overhead.inputs
CPU = Place(0, 1, torch.device("cpu"))
VIT = Backbone(
    timm="vit_tiny_patch16_224",
    image_size=16,
    args={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
)


def ways_of(inputs, folder, speed=DEFAULT, backbone=None):
    images, llm, stores = inputs
    chosen = settings()
    if backbone:
        each = {
            name: getattr(chosen, name).model_copy(update={"backbone": backbone})
            for name in ("flame", "clip")
        }
        chosen = chosen.model_copy(update=each)
    encoder = FrozenLLM(llm, chosen.embedding, dtype="float32", device="cpu")
    timed = steps.runs(images, stores, encoder, chosen)
    return steps.training_ways(timed, images, encoder, folder, speed=speed)


def test_nothing_is_read_or_decoded_while_the_clock_runs(inputs, tmp_path, monkeypatch):
    ways = ways_of(inputs, tmp_path)
    assert {name: way.units for name, way in ways.items()} == {"flame": 2, "clip": 2, "online": 1}

    def refuse(*args, **options):
        raise AssertionError("read during a step")

    monkeypatch.setattr(reading, "decode", refuse)
    monkeypatch.setattr(tokens, "tokenize", refuse)
    monkeypatch.setattr(store.Embeddings, "request", refuse)
    for _ in range(3):
        for way in ways.values():
            way.run()


def test_the_online_step_has_the_images_of_the_stored_one_and_embeds_their_texts(inputs):
    images, llm, stores = inputs
    encoder = FrozenLLM(llm, settings().embedding, device="cpu")
    timed = steps.runs(images, stores, encoder, settings())
    reader = steps.ImageReader(images)
    schedules = {name: steps._schedule(timed[name], reader) for name in ("flame", "online")}
    ahead = steps.read_ahead(schedules["flame"], 2, 0, CPU)
    assert len(ahead) == 2
    for step in range(4):
        stored, online = (steps._batch(ahead, each, step) for each in (None, schedules["online"]))
        assert online.images is stored.images is ahead[step % 2].images
        np.testing.assert_allclose(online.texts, stored.texts, atol=0.05, rtol=0.05)


def test_large_batches_are_few_and_used_in_turn(inputs, monkeypatch):
    images, llm, stores = inputs
    encoder = FrozenLLM(llm, settings().embedding, device="cpu")
    timed = steps.runs(images, stores, encoder, settings())
    schedule = steps._schedule(timed["clip"], steps.ImageReader(images))
    monkeypatch.setattr(steps, "AHEAD_BYTES", 1)
    assert len(steps.read_ahead(schedule, 2, 0, CPU)) == 1


def test_trainings_take_the_speed_settings_of_the_machine(inputs, tmp_path, caplog):
    caplog.set_level("INFO")
    for way in ways_of(inputs, tmp_path, Speed(micro_batch=2), VIT).values():
        way.run()
    assert "clip: micro-batches of 2 images, checkpointing never" in caplog.text
    with pytest.raises(ValueError, match="micro_batch 2 of 4 images: BatchNorm"):
        ways_of(inputs, tmp_path, Speed(micro_batch=2))


def test_a_gpu_without_room_for_the_trainings_is_told_before_they_start(monkeypatch):
    def full(size, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.20 GiB.\nmore")

    monkeypatch.setattr(steps.torch, "empty", full)
    said = "no room for 6.2 GB of weights and optimizers .* beside the LLM: CUDA out of memory"
    with (
        pytest.raises(ValueError, match=said),
        steps._reserved(6_200_000_000, torch.device("cuda")),
    ):
        pass
