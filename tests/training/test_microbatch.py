"""Micro-batches and gradient checkpointing: the loss curve and the gradient of the whole batch."""

import numpy as np
import pytest
import torch
from torch import nn

from flame.towers.base import Outputs
from flame.towers.flame import FlameTower
from flame.train import train
from flame.training import microbatch
from flame.training.loss import StepLoss
from flame.training.speed import Speed
from tests.training.test_processes import (
    CNN,
    DIM,
    DROPPING,
    SIZE,
    STEPS,
    clip,
    curve,
    flame,
    given,
    inputs,  # noqa: F401  a fixture
    long_clip,
    together,
)

METHODS = {"flame": flame, "clip": clip, "long-clip": long_clip}
SPEEDS = {
    "micro-batches": Speed(micro_batch=2),
    "checkpointing": Speed(grad_checkpointing="always"),
    "both": Speed(micro_batch=2, grad_checkpointing="always"),
}


@pytest.mark.parametrize(("images", "micro_batch"), [(6, 2), (6, 4), (7, 3), (4, 9), (1, 1)])
def test_micro_batches_are_all_images_in_parts_as_equal_as_possible(images, micro_batch):
    parts = microbatch.split(images, micro_batch)
    assert [i for part in parts for i in range(images)[part]] == list(range(images))
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) <= micro_batch
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_curve_is_that_of_the_whole_batch(inputs, tmp_path, method, loss):  # noqa: F811
    """In one process and in two, whose shares of 3 images make micro-batches of 1 and of 2."""
    # Adam turns a gradient near zero, and so any rounding error, into a whole step.
    wanted = METHODS[method](loss=loss, eps=1e-6, tau=0.1)
    if method == "long-clip" and not (inputs / "base").exists():
        train(inputs / "dots", inputs / "base", clip(epochs=1))
    told = given(inputs, wanted)
    train(**told, out=tmp_path / "whole", settings=wanted)
    for name, speed in SPEEDS.items():
        train(**told, out=tmp_path / name, settings=wanted, speed=speed)
    flags = ("--micro-batch", "2", "--grad-checkpointing", "always")
    together(inputs, tmp_path / "two", wanted, extra=flags)
    expected = curve(tmp_path / "whole", "loss", "tau")
    assert len(expected) == STEPS
    for name in (*SPEEDS, "two"):
        found = curve(tmp_path / name, "loss", "tau")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)


def test_dropout_draws_the_same_in_both_passes_of_a_micro_batch():
    """The gradient is that of one graph over all micro-batches with these draws."""
    recipe = flame().recipe
    torch.manual_seed(0)
    tower = FlameTower(flame(DROPPING).backbone, recipe, DIM).train()
    facets = [("raw", "scene"), ("long", "object")]
    tower.match(facets)
    loss, columns = StepLoss(recipe, facets), torch.tensor([0, 1])
    images, texts = torch.rand(6, 3, SIZE, SIZE), torch.randn(6, 2, DIM)

    def forward(module, number):
        torch.manual_seed(number)
        part = slice(2 * number, 2 * number + 2)
        return module(images[part], texts[part], columns)

    parts = [forward(tower, number) for number in range(3)]
    features = (torch.cat(each) for each in list(zip(*parts, strict=True))[:2])
    whole = Outputs(*features, *parts[0][2:])
    expected = loss(whole, columns)
    expected.backward()
    gradients = {name: each.grad for name, each in tower.named_parameters()}
    tower.zero_grad()
    found, scale = microbatch.backward(tower, forward, 3, lambda outputs: loss(outputs, columns))
    torch.testing.assert_close(found, expected.detach())
    assert scale == tower.log_scale.exp()
    for name, each in tower.named_parameters():
        torch.testing.assert_close(each.grad, gradients[name])
    again = [forward(tower, number).images for number in (0, 0, 1)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(forward(tower, 0).images, tower(images[:2], texts[:2], columns).images)


@pytest.mark.parametrize("name", ["micro-batches", "checkpointing"])
def test_a_tower_with_batch_norm_is_refused_what_would_change_it(inputs, tmp_path, name):  # noqa: F811
    wanted = flame(CNN)
    message = {
        "micro-batches": "micro_batch 2 of 6 images: BatchNorm needs the statistics of all",
        "checkpointing": "grad_checkpointing always: BatchNorm would count every batch twice",
    }
    with pytest.raises(ValueError, match=message[name]):
        train(**given(inputs, wanted), out=tmp_path, settings=wanted, speed=SPEEDS[name])


def test_a_backbone_without_gradient_checkpointing_is_named():
    tower = FlameTower(flame().backbone, flame().recipe, DIM)
    tower.visual = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear of timm has no gradient checkpointing"):
        tower.checkpoint_activations()
