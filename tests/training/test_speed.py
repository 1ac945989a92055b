"""Settings of a machine: compilation, TF32, and what is said when something is missing."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from flame.towers.base import Tower
from flame.towers.load import create, load
from flame.train import train
from flame.training.loss import softmax_loss
from flame.training.speed import Speed, check_compiler, fast_products
from flame.training.trainer import Trainer
from tests.training.test_processes import DIM, clip, curve, flame, given, inputs, weights  # noqa: F401

CPU = torch.device("cpu")
# Needs no compiler, unlike inductor.
COMPILED = Speed(compile="aot_eager")


@pytest.mark.parametrize("wanted", [flame(), flame(projector="per_token")])
def test_a_compiled_backbone_learns_the_same_under_the_same_names(inputs, tmp_path, wanted):  # noqa: F811
    all_at_once = Speed(micro_batch=2, grad_checkpointing="always", compile="aot_eager")
    for name, speed in {"plain": Speed(), "compiled": all_at_once}.items():
        train(**given(inputs, wanted), out=tmp_path / name, settings=wanted, speed=speed)
    found, expected = (curve(tmp_path / name, "loss", "tau") for name in ("compiled", "plain"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    tower, _ = load(tmp_path / "compiled")
    assert list(tower.state_dict()) == list(create(wanted, DIM).state_dict())


def test_an_interrupted_compiled_training_goes_on_to_the_same_bytes(
    inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    wanted, out = flame(epochs=2, checkpoint_minutes=1e-9), tmp_path / "run"
    told = given(inputs, wanted)
    steps = iter(range(100))

    def killed(tower):
        if next(steps) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tower, "clamp_scale", killed)
        with pytest.raises(KeyboardInterrupt):
            train(**told, out=out, settings=wanted, speed=COMPILED)
    train(**told, out=out, settings=wanted, speed=COMPILED)
    train(**told, out=tmp_path / "whole", settings=wanted, speed=COMPILED)
    assert weights(out) == weights(tmp_path / "whole")


def test_a_compiler_that_is_missing_is_named_before_the_data_is_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^compile nonsense: .*; compile none trains without"):
        check_compiler("nonsense", CPU)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"^compile inductor: .*; compile none trains without"):
        check_compiler("inductor", CPU)
    check_compiler("none", CPU)


def test_running_out_of_memory_names_the_batch_and_the_settings(inputs, tmp_path, monkeypatch):  # noqa: F811
    def backward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Trainer, "_backward", backward)
    message = (
        "^out of GPU memory with 6 images a process, micro_batch 2, grad_checkpointing never: set "
        r"a smaller micro_batch, or grad_checkpointing always \(CUDA out of memory.*GiB\.\)$"
    )
    speed = Speed(micro_batch=2)
    with pytest.raises(ValueError, match=message):
        train(**given(inputs, flame()), out=tmp_path / "run", settings=flame(), speed=speed)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="micro_batch 0 is less than 1"):
        Speed(micro_batch=0)


def test_products_in_tf32_end_with_their_block():
    def flags():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = flags()
    for enabled, expected in ((True, ("high", True)), (False, ("highest", False))):
        with fast_products(enabled):
            assert flags() == expected
        assert flags() == before


def test_the_error_of_tf32_is_far_below_that_of_features_in_bfloat16():
    """TF32 rounds both factors of a product to 10 bits of mantissa, emulated here."""
    rng = torch.Generator().manual_seed(0)
    texts = torch.randn(256, 512, generator=rng)
    images = normalize(texts + 3 * torch.randn(256, 512, generator=rng), dim=-1)
    texts = normalize(texts, dim=-1)[:, None]

    def loss(images, texts):
        leaf = images.clone().requires_grad_()
        value = softmax_loss(leaf, texts, torch.tensor(100.0), torch.tensor(0.0))
        value.backward()
        return value.item(), leaf.grad

    def tf32(values):
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    exact, gradient = loss(images, texts)
    errors = {}
    for name, features in {
        "tf32": (tf32(images), tf32(texts)),
        "bfloat16": (images.bfloat16().float(), texts),
    }.items():
        value, found = loss(*features)
        errors[name] = abs(value - exact), ((found - gradient).norm() / gradient.norm()).item()
    assert errors["tf32"][0] < 0.5 * errors["bfloat16"][0] < 1e-3
    assert errors["tf32"][1] < 0.5 * errors["bfloat16"][1] < 1e-2
