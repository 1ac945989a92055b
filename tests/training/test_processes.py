"""Training in several processes: same losses as in one, one stop for all, errors end all."""

import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn.modules.batchnorm import _BatchNorm

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import store
from flame.runtime import command
from flame.runtime.resumable import resumable
from flame.study.schema.runs import Backbone, Recipe
from flame.study.settings import ClipTraining, FlameTraining, LongClipTraining
from flame.towers.flame import FlameTower
from flame.train import train
from flame.training.processes import Place, sync_batch_norm
from tests import forks

FACETS = {"scene": " a", "object": " b"}
# Two of 33 images have no long caption; the other 31 make five batches of 6, with one left over.
IMAGES, BARE, BATCH, EPOCHS, STEPS = 33, 2, 6, 4, 20
SIZE, DIM = 16, 12
VIT = {"timm": "test_vit", "image_size": SIZE, "args": {"patch_size": 4}}
# Each process draws the stochastic depth of its own images.
DROPPING = VIT | {"args": {"patch_size": 4, "drop_path_rate": 0.2}}
CNN = {
    "timm": "resnet10t",
    "image_size": SIZE,
    "args": {"channels": [8, 8, 16, 16], "stem_width": 4},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data set with one to three captions of a kind per image, and stores of two kinds."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("processes")
    writer = ShardWriter(root / "dots", samples_per_shard=10)
    keys = [f"dot-{i}" for i in range(IMAGES)]
    of_kind = {"raw": [], "long": []}
    for i, key in enumerate(keys):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(png, "PNG")
        raw = [f"dot {key} {n}" for n in range(1 + i % 3)]
        long = [f"a picture of {key}, said {n} times" for n in range(1 + i % 2)]
        captions = {"raw": raw, "long": long if i >= BARE else [], "short": [f"a {key}"]}
        writer.add(Sample(key=key, image=png.getvalue(), captions=captions))
        for kind, rows in of_kind.items():
            rows += [key] * len(captions[kind])
    (root / "dots" / "manifest.json").write_text(json.dumps(writer.close()))
    for kind, rows in of_kind.items():
        path = root / "store" / kind / "0.zarr"
        store.create(path, {"kind": kind, "facets": FACETS, "part": 0, "parts": 1})
        vectors = rng.normal(1.0, 1.0, (len(rows), len(FACETS), DIM))
        store.Writer(path, "dots", keys=rows, facets=list(FACETS), dim=DIM).write(
            range(len(rows)), vectors
        )
    return root


def shared(backbone, **recipe):
    plain = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "precision": "float32",
        "augment": {"scale": (0.5, 1.0), "shift": 3},
    }
    return {
        "run": "tiny",
        "seed": 0,
        "dataset": "dots",
        "backbone": backbone,
        "recipe": Recipe(**(plain | recipe)),
        "max_skipped": 0.1,
        "version": 1,
    }


def flame(backbone=VIT, **recipe):
    targets = {"raw": ("scene",), "long": ("scene", "object")}
    return FlameTraining(targets=targets, **shared(backbone, **recipe))


def clip(**recipe):
    sizes = {"width": 16, "layers": 2, "heads": 2, "context_length": 12, "embed_dim": 8}
    return ClipTraining(method="clip", captions="raw", text_tower=sizes, **shared(VIT, **recipe))


def long_clip(**recipe):
    return LongClipTraining(
        method="long-clip",
        long="long",
        short="short",
        text_tower=clip().text_tower,
        context_length=20,
        kept_positions=4,
        components=3,
        **shared(VIT, **recipe),
    )


def given(inputs, wanted):
    """Inputs of `train`."""
    told = {"images": inputs / "dots"}
    if wanted.method == "flame":
        told["stores"] = tuple(sorted(inputs.glob("store/*/0.zarr")))
    if wanted.method == "long-clip":
        told["base"] = inputs / "base"
    return told


def worker(environment, errors, folder, kwargs):
    """The command line of `train` in one process, with the environment that `torchrun` sets."""
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    sys.argv = ["train", *kwargs]
    command.main(train)


def start(inputs, out, wanted, processes=2, folders=None, device="cpu", extra=()):
    """Start processes that train together; their stderr goes to `<out>.err<rank>`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--out", str(out), "--settings", wanted.model_dump_json(), "--device", device, *extra]
    for name, value in given(inputs, wanted).items():
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    running = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        address["NVIDIA_TF32_OVERRIDE"] = 0  # float32 is float32
        environment = {name: str(value) for name, value in (place | address).items()}
        folder = folders[rank] if folders else inputs
        running.append(forks.start(worker, environment, words(out, rank, folder), folder, flags))
    return running


def words(out, rank, folder=Path()):
    return folder / out.with_name(f"{out.name}.err{rank}")


def end(running, seconds=240):
    """Exit codes of the processes; fails if they do not end in time."""
    until = time.monotonic() + seconds
    for process in running:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert None not in codes, f"after {seconds} s not all had ended: {codes}"
    return codes


def together(inputs, out, wanted, processes=2, **how):
    codes = end(start(inputs, out, wanted, processes, **how))
    assert codes == [0] * processes, words(out, 0).read_text()


def curve(folder, *names):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in names] for line in lines])


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


CASES = {
    "softmax": flame(),
    "sigmoid": flame(loss="sigmoid", tau=0.1, standardize="center"),
    "weighed": flame(weigh="kinds", facets_per_step=2, gradient_clip=0.5),
    "per-token": flame(projector="per_token"),
    "clip": clip(),
    "long-clip": long_clip(),
}
# Adam turns a gradient near zero, and so any rounding error, into a whole step.
BATCH_NORM = flame(CNN, eps=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_many_processes_have_the_loss_curve_of_one(inputs, tmp_path, name):
    wanted = CASES[name]
    if name == "long-clip":
        train(inputs / "dots", inputs / "base", clip(epochs=1))
    train(**given(inputs, wanted), out=tmp_path / "1", settings=wanted)
    expected = curve(tmp_path / "1", "loss", "tau")
    assert len(expected) == STEPS
    for processes in (2, 3) if name == "softmax" else (2,):
        together(inputs, tmp_path / str(processes), wanted, processes)
        found = curve(tmp_path / str(processes), "loss", "tau")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "batch-norm", "clip"])
def test_two_gpus_have_the_loss_curve_of_one(inputs, tmp_path, name):
    wanted = (CASES | {"batch-norm": BATCH_NORM})[name]
    for processes in (1, 2):
        together(inputs, tmp_path / str(processes), wanted, processes, device="cuda")
    found, expected = (curve(tmp_path / n, "loss", "tau") for n in ("2", "1"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["batch-norm", "stochastic-depth"])
def test_what_each_cpu_process_does_for_itself_is_repeated_to_the_byte(inputs, tmp_path, name):
    """BatchNorm and stochastic depth: two runs agree, a single process has another loss curve."""
    wanted = {"batch-norm": BATCH_NORM, "stochastic-depth": flame(DROPPING)}[name]
    for out in ("once", "again"):
        together(inputs, tmp_path / out, wanted)
    assert weights(tmp_path / "once") == weights(tmp_path / "again")
    losses = curve(tmp_path / "once", "loss")
    assert losses[-5:].mean() < losses[:5].mean()
    train(**given(inputs, wanted), out=tmp_path / "alone", settings=wanted)
    assert np.abs(losses - curve(tmp_path / "alone", "loss")).max() > 1e-3
    warned = (
        "BatchNorm layers use the statistics of each process"
        in words(tmp_path / "once", 0).read_text()
    )
    assert warned == (name == "batch-norm")


@pytest.mark.parametrize("timm_name", ["resnet10t", "test_efficientnet"])
def test_batch_norms_become_torchs_on_gpus_and_keep_names_and_activations(timm_name):
    """The conversion itself needs no GPU."""
    torch.manual_seed(0)
    tower = FlameTower(Backbone(timm=timm_name, image_size=32), flame().recipe, DIM)
    before, images = tower.state_dict(), torch.rand(2, 3, 32, 32)
    features = tower.eval().encode_image(images)
    for place in (Place(0, 1, torch.device("cuda")), Place(0, 2, torch.device("cpu"))):
        sync_batch_norm(tower, place)
        assert not any(isinstance(each, torch.nn.SyncBatchNorm) for each in tower.modules())
    sync_batch_norm(tower, Place(1, 2, torch.device("cuda")))
    norms = [each for each in tower.modules() if isinstance(each, _BatchNorm)]
    assert {isinstance(each, torch.nn.SyncBatchNorm) for each in norms} == {True}
    assert list(tower.state_dict()) == list(before)
    assert torch.equal(tower.encode_image(images), features)
    trained = {id(each) for each in tower.parameters()}
    assert {id(each.weight) for each in norms} <= trained


def partial_of(out):
    return out.with_name(out.name + ".partial")


def wait_for(running, condition):
    while not condition():
        assert all(process.is_alive() for process in running)
        time.sleep(0.01)


def steps(out):
    log = partial_of(out) / "content" / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("told", [[0, 1], [1]], ids=["all", "one"])
def test_processes_that_are_told_to_stop_do_so_at_one_step_and_go_on(inputs, tmp_path, told):
    wanted, out = flame(DROPPING, epochs=8, checkpoint_minutes=60), tmp_path / "run"
    running = start(inputs, out, wanted)
    wait_for(running, lambda: steps(out) >= 3)
    for rank in told:
        os.kill(running[rank].pid, signal.SIGTERM)
    assert end(running) == [143, 143]
    for rank in range(2):
        assert "Traceback" not in words(out, rank).read_text()
    assert not out.exists()
    assert not (partial_of(out) / "lease.lock").exists()
    with safe_open(partial_of(out) / "content" / "checkpoint.safetensors", "pt") as file:
        stopped = int(file.metadata()["step"])
    assert 3 <= stopped < 40
    together(inputs, out, wanted)
    assert f"resuming from step {stopped} of 40" in words(out, 0).read_text()
    together(inputs, tmp_path / "whole", wanted)
    assert weights(out) == weights(tmp_path / "whole")
    np.testing.assert_array_equal(curve(out, "loss"), curve(tmp_path / "whole", "loss"))


def test_an_output_that_another_job_writes_is_refused_by_all(inputs, tmp_path):
    out = tmp_path / "run"
    with resumable(out, {}):
        running = start(inputs, out, flame())
        assert end(running) == [1, 1]
    for rank in range(2):
        told = words(out, rank).read_text()
        assert f"error: {out}.partial is being written by process {os.getpid()} on " in told
        assert "Traceback" not in told


def test_a_loss_that_is_not_finite_ends_all(inputs, tmp_path):
    out = tmp_path / "run"
    assert end(start(inputs, out, flame(lr=1e38, eps=1e-30))) == [1, 1]
    for rank in range(2):
        told = words(out, rank).read_text()
        assert re.search(r"error: not finite: .*'step': \d+", told), told
        assert "Traceback" not in told
    assert not out.exists()


def test_an_error_of_one_process_ends_the_others(inputs, tmp_path):
    broken = tmp_path / "inputs"
    shutil.copytree(inputs, broken)
    shard = broken / "dots" / "shard-00000.tar"
    row = pl.read_parquet(broken / "dots" / "index.parquet").row(5, named=True)
    data = bytearray(shard.read_bytes())
    data[row["offset"] : row["offset"] + row["size"]] = bytes(row["size"])
    shard.write_bytes(data)
    running = start(broken, tmp_path / "run", flame(), extra=("--cache-mb", "0"))
    assert end(running) == [1, 1]
    told = [words(tmp_path / "run", rank).read_text() for rank in range(2)]
    assert any(re.search(r"error: image 'dot-5' in .*shard-00000.tar", each) for each in told)


def test_processes_that_see_other_checkpoints_are_refused(inputs, tmp_path):
    """As on nodes without a shared file system."""
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
    out, wanted = Path("run"), flame(epochs=8)
    running = start(inputs, out, wanted, folders=folders)
    wait_for(running, lambda: steps(folders[0] / out) >= 3)
    os.kill(running[0].pid, signal.SIGTERM)
    assert end(running) == [143, 143]
    assert end(start(inputs, out, wanted, folders=folders)) == [1, 1]
    for rank, folder in enumerate(folders):
        told = words(out, rank, folder).read_text()
        assert re.search(r"error: processes see checkpoints of steps \[\d+, 0\] in run", told), told
