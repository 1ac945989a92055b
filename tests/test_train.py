"""The training stage on a real, tiny data set and store."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import store
from flame.evaluate import evaluate
from flame.study.schema.benchmarks import Bootstrap
from flame.study.settings import (
    EvaluateSettings,
    Question,
)
from flame.towers.base import Tower
from flame.towers.flame import FlameTower
from flame.towers.load import load
from flame.train import sources, train
from flame.training.optim import adamw, learning_rate
from tests import dots
from tests.broken import broken_forms, replaced
from tests.dots import (
    DIM,
    FACETS,
    IMAGES,
    SIZE,
    call_number,
    clip_settings,
    log_lines,
    long_settings,
    settings,
    weights,
)

GOLDEN = Path(__file__).parent / "golden" / "train.txt"
STEPS = 10
ENVIRONMENT = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Folder of a data set with 24 images, and the stores of its raw and long captions."""
    return dots.write(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(**inputs, out=out, settings=settings())
    return out


def test_losses_of_the_first_steps_are_the_golden_ones(finished):
    golden = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    losses = [line["loss"] for line in log_lines(finished)]
    assert len(golden) == STEPS
    assert losses[:STEPS] == pytest.approx(golden, abs=1e-4)


def test_a_finished_run_holds_what_others_need(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "SHA256SUMS",
        "log.jsonl",
        "loss.png",
        "model.safetensors",
        "run.json",
    ]
    tower, record = load(finished)
    assert record["steps"] == 12
    assert record["pairs"]["used"] == IMAGES
    assert record["loss"] == log_lines(finished)[-1]["loss"]
    assert set(tower.centers) == {"raw", "long"}
    assert set(tower.centers["raw"]) == set(FACETS)
    last = log_lines(finished)[-1]
    assert {"epoch", "tau", "lr", "images_per_second", "data_wait", "grad_norm"} < set(last)


def test_two_runs_have_the_same_bytes_whatever_is_kept_in_memory(inputs, finished, tmp_path):
    train(**inputs, out=tmp_path / "again", settings=settings(), cache_mb=0)
    assert weights(tmp_path / "again") == weights(finished)


def test_an_interrupted_run_goes_on_to_the_same_bytes(inputs, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    often = settings(checkpoint_minutes=1e-9)
    train(**inputs, out=tmp_path / "whole", settings=often)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # After the update of step 7 and before its checkpoint.
        patch.setattr(Tower, "clamp_scale", call_number(8, killed))
        with pytest.raises(KeyboardInterrupt):
            train(**inputs, out=out, settings=often)
    train(**inputs, out=out, settings=often)
    assert weights(out) == weights(tmp_path / "whole") == weights(finished)
    losses, expected = ([line["loss"] for line in log_lines(p)] for p in (out, finished))
    assert losses == expected


def test_sigterm_ends_a_run_between_two_steps(inputs, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        terminate = call_number(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(Tower, "clamp_scale", terminate)
        with pytest.raises(SystemExit, match="143"):
            train(**inputs, out=out, settings=settings())
    with safe_open(tmp_path / "run.partial" / "content" / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "5"
    train(**inputs, out=out, settings=settings())
    assert weights(out) == weights(finished)


def test_a_killed_process_goes_on_to_the_same_bytes(inputs, tmp_path):
    wanted, out = settings(epochs=60, checkpoint_minutes=1e-9), tmp_path / "run"
    command = [sys.executable, "-m", "flame.train", "--images", inputs["images"]]
    command += ["--stores", *inputs["stores"]]
    command += ["--out", out, "--settings", wanted.model_dump_json()]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE)
    log = tmp_path / "run.partial" / "content" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not out.exists()
    train(**inputs, out=out, settings=wanted)
    train(**inputs, out=tmp_path / "whole", settings=wanted)
    assert weights(out) == weights(tmp_path / "whole")


def _with_workers(inputs, out, wanted):
    """A training with two workers in a process group of its own, once it has made a few steps."""
    command = [sys.executable, "-m", "flame.train", "--images", inputs["images"]]
    command += ["--stores", *inputs["stores"], "--workers", "2", "--cache-mb", "0"]
    command += ["--out", out, "--settings", wanted.model_dump_json()]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True
    )
    log = out.with_name(out.name + ".partial") / "content" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    return process


def _wait_until_all_end(group, seconds):
    """Wait for the last process of a group; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while alive := [each for each in psutil.process_iter(["status"]) if _is_alive(each, group)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def _is_alive(process, group):
    with suppress(ProcessLookupError):
        ended = process.info["status"] == psutil.STATUS_ZOMBIE
        return os.getpgid(process.pid) == group and not ended


def test_sigterm_of_a_whole_group_leaves_a_checkpoint_and_no_worker(inputs, tmp_path):
    """As `scancel` and `timeout` send it: to the training and its workers at once."""
    wanted, out = settings(epochs=100, checkpoint_minutes=60), tmp_path / "run"
    process = _with_workers(inputs, out, wanted)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said.decode()
    _wait_until_all_end(process.pid, 10)
    content = tmp_path / "run.partial" / "content"
    with safe_open(content / "checkpoint.safetensors", "pt") as file:
        step = int(file.metadata()["step"])
    assert step > 5
    train(**inputs, out=out, settings=wanted, cache_mb=0)
    train(**inputs, out=tmp_path / "whole", settings=wanted)
    assert weights(out) == weights(tmp_path / "whole")


def test_workers_end_with_a_training_that_is_killed(inputs, tmp_path):
    process = _with_workers(inputs, tmp_path / "run", settings(epochs=2000))
    process.kill()
    process.communicate()
    _wait_until_all_end(process.pid, 20)


@pytest.fixture(scope="session")
def clip_run(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "run"
    train(inputs["images"], out, clip_settings())
    return out


def baseline(method, inputs, clip_run):
    """Arguments of `train` besides `out` and `settings`, and the settings of a recipe."""
    if method == "clip":
        return {"images": inputs["images"]}, clip_settings
    return {"images": inputs["images"], "base": clip_run}, long_settings


@pytest.mark.parametrize("method", ["clip", "long-clip"])
@pytest.mark.parametrize("end", ["killed", "terminated"])
def test_an_interrupted_baseline_goes_on_to_the_same_bytes(
    inputs, clip_run, tmp_path, monkeypatch, method, end
):
    given, of = baseline(method, inputs, clip_run)
    often = of(checkpoint_minutes=1e-9 if end == "killed" else 60)

    def killed():
        if end == "killed":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tower, "clamp_scale", call_number(8, killed))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(**given, out=tmp_path / "run", settings=often)
    content = tmp_path / "run.partial" / "content"
    with safe_open(content / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == ("7" if end == "killed" else "8")
    train(**given, out=tmp_path / "run", settings=often)
    train(**given, out=tmp_path / "whole", settings=of(), cache_mb=0)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    losses, expected = (
        [line["loss"] for line in log_lines(tmp_path / n)] for n in ("run", "whole")
    )
    assert losses == expected
    assert len(losses) == 12


def test_a_baseline_is_found_again_with_its_texts(clip_run):
    tower, record = load(clip_run)
    assert record["settings"]["method"] == "clip"
    assert record["dim"] == tower.dim == 8
    assert tower.encode_text(["dot dot-1", "dot"]).shape == (2, 8)


def test_clip_learns_a_tiny_set(inputs, tmp_path):
    wanted = clip_settings(epochs=60, augment={}, lr=1e-2)
    train(inputs["images"], tmp_path / "run", wanted)
    losses = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_another_base_or_other_captions_start_the_run_afresh(inputs, clip_run, tmp_path):
    images = tmp_path / "dots"
    shutil.copytree(inputs["images"], images)
    words = images / "captions.parquet"
    fingerprints = []
    for change in (lambda: None, lambda: _reverse_captions(images)):
        change()
        fingerprints.append(sources(long_settings(), images, (), words, clip_run))
    assert fingerprints[0]["captions"] != fingerprints[1]["captions"]
    assert fingerprints[0]["base"] == fingerprints[1]["base"]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other")
    assert (
        sources(long_settings(), images, (), words, tmp_path / "base")["base"]
        != fingerprints[1]["base"]
    )


def _reverse_captions(images):
    path = images / "captions.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)


def test_a_base_of_other_sizes_is_refused_with_its_folder(inputs, clip_run, tmp_path):
    wanted = long_settings()
    wider = wanted.text_tower.model_copy(update={"width": 32})
    wanted = wanted.model_copy(update={"text_tower": wider})
    with pytest.raises(ValueError, match=r"run: text_tower .*'width': 16.*, not .*'width': 32"):
        train(inputs["images"], tmp_path / "run", wanted, base=clip_run)


def test_an_input_that_a_method_does_not_take_is_refused(inputs, clip_run, tmp_path):
    images, stores = inputs["images"], inputs["stores"]
    for wanted, given, message in (
        (settings(), {}, "'flame' needs --stores"),
        (clip_settings(), {"stores": stores}, "'clip' takes no --stores"),
        (clip_settings(), {"base": clip_run}, "'clip' takes no --base"),
        (long_settings(), {}, "'long-clip' needs --base"),
    ):
        with pytest.raises(ValueError, match=message):
            train(images, tmp_path / "run", wanted, **given)


def test_two_processes_train_a_baseline_from_the_command_line(inputs, clip_run, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "flame.train", "--images", inputs["images"], "--base", clip_run]
    wanted = long_settings(epochs=1, warmup_steps=1)
    command += ["--out", tmp_path / "run", "--settings", wanted.model_dump_json()]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]
    assert load(tmp_path / "run")[0].context_length == 20


def test_two_processes_train_one_tower(inputs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "flame.train", "--images", inputs["images"], "--stores", *inputs["stores"]]
    wanted = settings(epochs=1, warmup_steps=1, loss="sigmoid")
    command += ["--out", tmp_path / "run", "--settings", wanted.model_dump_json()]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]


def test_workers_that_read_ahead_change_nothing(inputs, finished, tmp_path):
    train(**inputs, out=tmp_path / "run", settings=settings(), cache_mb=0, workers=1)
    assert weights(tmp_path / "run") == weights(finished)


def test_a_tiny_set_is_learned(inputs, tmp_path):
    train(**inputs, out=tmp_path / "run", settings=settings(epochs=60, augment={}, lr=1e-2))
    losses = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"not finite.*'step': \d+.*'tau'.*'lr'.*checkpoint"):
        train(**inputs, out=tmp_path / "run", settings=settings(lr=1e38, eps=1e-30))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"batch_size": 25}, "batch_size 25 is more than the 24 pairs"),
        ({"warmup_steps": 12}, "warmup_steps 12 of only 12 steps"),
        ({"facets_per_step": 4}, "facets_per_step 4 is more than the 3"),
    ],
)
def test_impossible_recipes_are_refused(inputs, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        train(**inputs, out=tmp_path / "run", settings=settings(**recipe))


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = settings(lr=1.0, warmup_steps=4).recipe
    rates = [learning_rate(step, 104, recipe) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.5)
    assert rates[104] == pytest.approx(0.0)


def test_vectors_do_not_decay():
    tower = FlameTower(settings().backbone, settings().recipe, DIM)
    kept, decaying = adamw(tower, settings().recipe).param_groups
    assert decaying["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert any(param is tower.log_scale for param in kept["params"])
    assert {param.ndim for param in kept["params"]} == {0, 1}
    assert {param.ndim for param in decaying["params"]} == {2, 4}
    assert torch.is_tensor(tower.bias)


OFTEN = settings(checkpoint_minutes=1e-9)


def interrupt(monkeypatch: pytest.MonkeyPatch, given: dict, out: Path) -> Path:
    """Kill a run after its seventh checkpoint; returns that checkpoint."""

    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tower, "clamp_scale", call_number(8, killed))
        with pytest.raises(KeyboardInterrupt):
            train(**given, out=out, settings=OFTEN)
    return out.with_name(f"{out.name}.partial") / "content" / "checkpoint.safetensors"


def test_a_broken_checkpoint_is_named_and_what_helps_is_said(inputs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    checkpoint = interrupt(monkeypatch, inputs, out)
    for data in [d for d in broken_forms(checkpoint) if d is not None]:
        with (
            replaced(checkpoint, data),
            pytest.raises(ValueError, match=f"{checkpoint} is corrupt: delete it to restart"),
        ):
            train(**inputs, out=out, settings=OFTEN)
    checkpoint.unlink()
    train(**inputs, out=out, settings=OFTEN)
    train(**inputs, out=tmp_path / "whole", settings=OFTEN)
    assert weights(out) == weights(tmp_path / "whole")


def test_images_of_one_colour_are_trained_on(inputs, tmp_path):
    """Identical features have finite losses and gradients."""
    images = tmp_path / "dots"
    shutil.copytree(inputs["images"], images)
    writer, red = ShardWriter(images, 10), BytesIO()
    Image.new("RGB", (SIZE, SIZE), "red").save(red, "PNG")
    for i in range(IMAGES):
        writer.add(Sample(f"dot-{i}", red.getvalue(), {}))
    writer.close()
    train(images, tmp_path / "run", settings(epochs=2), inputs["stores"])
    assert all(math.isfinite(line["loss"]) for line in log_lines(tmp_path / "run"))


def test_tau_at_its_clamp_stays_there_and_training_goes_on(inputs, tmp_path):
    """The range of 1/tau is so small that every step would leave it."""
    train(**inputs, out=tmp_path / "run", settings=settings(lr=2e-2, tau=1.0, max_scale=1.0001))
    lines = log_lines(tmp_path / "run")
    assert {round(line["tau"], 5) for line in lines} <= {1.0, 0.9999}
    assert len({line["loss"] for line in lines}) == len(lines) == 12


def test_evaluate_refuses_a_store_of_another_llm_of_the_same_width(inputs, tmp_path):
    train(**inputs, out=tmp_path / "run", settings=settings(epochs=2))
    other = tmp_path / "raw.zarr"
    attributes = {"kind": "raw", "facets": {"scene": " a"}, "part": 0, "parts": 1, "llm": "other"}
    store.create(other, attributes)
    writer = store.Writer(other, "dots", keys=["dot-0"], facets=["scene"], dim=DIM)
    writer.write(range(1), np.ones((1, 1, DIM)))
    asked = {"benchmark": "Dots", "task": "retrieval", "dataset": "dots", "captions": "raw"}
    question = Question.model_validate(asked | {"facets": ["scene"], "center": "raw"})
    wanted = EvaluateSettings(run="r", questions=(question,), bootstrap=Bootstrap(), version=1)
    out = tmp_path / "m.json", tmp_path / "m.parquet"
    with pytest.raises(ValueError, match=r"'Dots': .* with llm null, those .* have .other"):
        evaluate(tmp_path / "run", [inputs["images"]], *out, wanted, (other,))
    assert not out[0].exists()
