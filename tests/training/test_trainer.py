"""Steps run ahead of their numbers: none that is not finite changes a weight or a checkpoint."""

import math

import pytest
import torch
from safetensors.torch import load_file

from flame.towers.load import create
from flame.train import train
from flame.training.batches import Batch
from flame.training.processes import Place
from flame.training.trainer import Trainer
from tests.training.test_processes import (
    BATCH,
    CNN,
    DIM,
    SIZE,
    flame,
    given,
    inputs,  # noqa: F401  a fixture
    partial_of,
)


class RandomBatches:
    """Batches of noise; those of the steps in `broken` make the loss infinite."""

    facets = (("raw", "scene"), ("long", "scene"), ("long", "object"))
    steps_per_epoch, cached = 8, True

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 8

    def __getitem__(self, step):
        draws = torch.Generator().manual_seed(step)
        images = torch.randint(256, (BATCH, 3, SIZE, SIZE), generator=draws, dtype=torch.uint8)
        texts = torch.randn(BATCH, 3, DIM, generator=draws).half()
        return Batch(images, texts * math.nan if step in self.broken else texts, torch.arange(3))


def trainer_of(folder, broken=(), **recipe):
    torch.manual_seed(0)
    wanted, place = flame(**recipe), Place(0, 1, torch.device("cpu"))
    return Trainer(create(wanted, DIM), RandomBatches(broken), wanted, folder, place)


def state(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    tensors = [value.clone() for each in optimizer.values() for value in each.values()]
    return [*(each.clone() for each in trainer.tower.state_dict().values()), *tensors]


def test_steps_that_run_ahead_have_the_numbers_of_steps_that_are_waited_for(tmp_path):
    ahead, waiting = trainer_of(tmp_path), trainer_of(tmp_path)
    for step in range(4):
        ahead.begin(ahead.batches[step])
    assert ahead.step == 4
    lines = [waiting.advance(waiting.batches[step]) for step in range(4)]
    assert [ahead.finish() for _ in range(4)] == lines
    assert all(map(torch.equal, state(ahead), state(waiting)))


def test_after_a_step_that_is_not_finite_no_step_changes_anything(tmp_path):
    trainer = trainer_of(tmp_path, broken=[2])
    for step in range(2):
        trainer.advance(trainer.batches[step])
    before = state(trainer)
    for step in (2, 3):  # the third step is broken, the fourth is not
        trainer.begin(trainer.batches[step])
    assert all(map(torch.equal, state(trainer), before))
    with pytest.raises(ValueError, match=r"not finite: {'step': 3, .*; there is no checkpoint yet"):
        trainer.finish()


def test_the_result_is_the_moving_average_of_the_weights(tmp_path):
    trainer, plain = (
        trainer_of(tmp_path, backbone=CNN, ema=0.75),
        trainer_of(tmp_path, backbone=CNN),
    )
    expected: dict[str, torch.Tensor] = {}
    for step in range(4):
        trainer.advance(trainer.batches[step])
        plain.advance(plain.batches[step])
        for name, now in trainer.tower.state_dict().items():
            before = expected.get(name, now)
            expected[name] = 0.75 * before + 0.25 * now if now.is_floating_point() else now.clone()
    assert all(map(torch.equal, state(trainer), state(plain)))  # it changes no step
    result = trainer.result.state_dict()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(result[name], value)
    assert not torch.equal(result["log_scale"], trainer.tower.log_scale)
    assert plain.result is plain.tower


def test_a_resumed_moving_average_is_that_of_an_undisturbed_run(tmp_path):
    whole, first = (trainer_of(tmp_path, backbone=CNN, ema=0.75) for _ in range(2))
    for step in range(6):
        whole.advance(whole.batches[step])
    for step in range(3):
        first.advance(first.batches[step])
    first._save()
    second = trainer_of(tmp_path, backbone=CNN, ema=0.75)
    assert second.step == 3
    for step in range(3, 6):
        second.advance(second.batches[step])
    ends = [each.result.state_dict().values() for each in (second, whole)]
    assert all(map(torch.equal, *ends))


def test_run_reads_the_numbers_of_a_step_while_the_next_one_runs(tmp_path, monkeypatch):
    calls = []
    for name in ("begin", "finish"):
        original = getattr(Trainer, name)

        def noted(self, *args, name=name, original=original, **how):
            calls.append(name)
            return original(self, *args, **how)

        monkeypatch.setattr(Trainer, name, noted)
    trainer = trainer_of(tmp_path)
    trainer.run(trainer.batches[step] for step in range(8))
    assert calls[:6] == ["begin", "begin", "finish", "begin", "finish", "begin"]
    assert calls[-2:] == ["finish", "finish"]
    assert calls.count("begin") == calls.count("finish") == 8
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 8


def test_a_checkpoint_never_holds_what_is_not_finite(inputs, tmp_path):  # noqa: F811
    wanted, out = flame(lr=1e38, eps=1e-30, checkpoint_minutes=1e-9), tmp_path / "run"
    with pytest.raises(ValueError, match=r"not finite: .*; last checkpoint with finite weights: "):
        train(**given(inputs, wanted), out=out, settings=wanted)
    tensors = load_file(partial_of(out) / "content" / "checkpoint.safetensors")
    assert all(each.isfinite().all() for each in tensors.values())
