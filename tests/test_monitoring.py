"""Validation, kept weights and profiles: they are right, and change no bit of what is trained."""

import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from flame.data.images import ImageReader
from flame.evaluate import evaluate
from flame.evaluation import validation
from flame.runtime.checksums import verify
from flame.study.schema.benchmarks import Bootstrap
from flame.study.settings import EvaluateSettings, Question, ValidationSettings
from flame.towers.base import Tower
from flame.towers.load import load, save
from flame.train import train
from flame.training import monitor, profiling
from flame.training.monitor import NOTHING, Monitoring
from flame.training.processes import Place
from flame.training.speed import Speed
from tests import dots
from tests.dots import IMAGES, call_number, clip_settings, log_lines, settings, weights

ENVIRONMENT = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
PER_EPOCH, EPOCHS = 3, 4  # steps of an epoch, epochs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return dots.write(tmp_path_factory.mktemp("monitoring"))


@pytest.fixture(scope="session")
def plain(inputs, tmp_path_factory):
    """Folders of a FLAME and a CLIP trained without anything else."""
    root = tmp_path_factory.mktemp("plain")
    for method in ("flame", "clip"):
        train(out=root / method, **asked(method, inputs))
    return root


def asked(method, inputs, **recipe):
    """Arguments of `train` for a method."""
    if method == "flame":
        return inputs | {"settings": settings(**recipe)}
    return {"images": inputs["images"], "settings": clip_settings(**recipe)}


def question(kind, method):
    """Retrieval with the captions of a kind."""
    flame = {"facets": ("scene",), "center": kind} if method == "flame" else {}
    shared = {"task": "retrieval", "dataset": "dots", "captions": kind}
    name = f"dots (for {kind} dots)"
    return Question(benchmark=f"{kind} dots", name=name, **shared, **flame)


def monitoring(method, inputs, *, keep=0, **options):
    questions = tuple(question(kind, method) for kind in ("raw", "long"))
    return Monitoring(
        validation=ValidationSettings(questions=questions, **options),
        validation_datasets=(inputs["images"],),
        validation_stores=inputs["stores"] if method == "flame" else (),
        keep_epochs=keep,
    )


def validations(folder):
    return {line["epoch"]: line["validation"] for line in log_lines(folder) if "validation" in line}


def evaluated(method, inputs, model, to):
    """Benchmark -> metric -> percent, by `flame.evaluate`."""
    given = monitoring(method, inputs)
    wanted = EvaluateSettings(
        run="tiny",
        questions=given.validation.questions,
        bootstrap=Bootstrap(resamples=1),
        version=1,
    )
    datasets = list(given.validation_datasets)
    evaluate(
        model, datasets, to / "m.json", to / "m.parquet", wanted, stores=given.validation_stores
    )
    records = json.loads((to / "m.json").read_text())["records"]
    return {r["name"]: {name: m["value"] for name, m in r["metrics"].items()} for r in records}


@pytest.mark.parametrize("method", ["flame", "clip"])
def test_a_validation_says_what_evaluate_says_and_changes_no_bit(
    method, inputs, plain, tmp_path, monkeypatch
):
    monkeypatch.setattr(validation, "BATCH_SIZE", 10)
    given = monitoring(method, inputs, keep=9)
    train(out=tmp_path / "run", **asked(method, inputs), monitoring=given)
    assert weights(tmp_path / "run") == weights(plain / method)
    steps = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert [line["loss"] for line in steps] == [line["loss"] for line in log_lines(plain / method)]
    logged = validations(tmp_path / "run")
    assert list(logged) == [0, 1, 2, 3, 4]
    kept = tmp_path / "run" / "epochs"
    assert sorted(path.name for path in kept.iterdir()) == ["1", "2", "3"]
    for epoch, model in [(1, kept / "1"), (3, kept / "3"), (4, tmp_path / "run")]:
        verify(model)
        expected = evaluated(method, inputs, model, tmp_path)
        assert logged[epoch].keys() == expected.keys()
        for name, metrics in logged[epoch].items():
            assert metrics == pytest.approx(expected[name], abs=1e-3)
    assert logged[0] != logged[4]


def test_a_validation_compiles_nothing(inputs, tmp_path):
    graphs = {}
    for name, given in (
        ("first", NOTHING),  # which also tries the compiler
        ("plain", NOTHING),
        ("validated", monitoring("flame", inputs)),
    ):
        torch._dynamo.reset()
        counters.clear()
        speed = Speed(compile="aot_eager")
        train(out=tmp_path / name, **asked("flame", inputs), speed=speed, monitoring=given)
        graphs[name] = counters["stats"]["unique_graphs"]
    assert graphs["validated"] == graphs["plain"] == 1
    assert weights(tmp_path / "validated") == weights(tmp_path / "plain")


def test_validations_come_every_so_many_epochs_and_at_both_ends(inputs, tmp_path):
    train(
        out=tmp_path / "run",
        **asked("flame", inputs),
        monitoring=monitoring("flame", inputs, every=3),
    )
    lines = [line for line in log_lines(tmp_path / "run") if "validation" in line]
    assert [*lines[0]["validation"]] == ["dots (for raw dots)", "dots (for long dots)"]
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (9, 3), (12, 4)]


def test_images_are_evenly_spread_and_decoded_once(inputs, tmp_path, monkeypatch):
    rows = []

    class Counted(ImageReader):
        def load(self, chosen, *args, **options):
            rows.extend(chosen)
            return super().load(chosen, *args, **options)

    monkeypatch.setattr(validation, "ImageReader", Counted)
    given = monitoring("flame", inputs, images=5)
    train(out=tmp_path / "run", **asked("flame", inputs), monitoring=given)
    assert rows == [0, 4, 9, 14, 19]
    hits = validations(tmp_path / "run")[4]["dots (for raw dots)"]["i2t_r@1"]
    assert hits % 20 == 0


def _content(folder):
    """What is the same in every run: weights, and the log without times."""
    timed = {"seconds", "images_per_second", "data_wait"}
    lines = [{k: v for k, v in line.items() if k not in timed} for line in log_lines(folder)]
    kept = {path.name: weights(path) for path in (folder / "epochs").iterdir()}
    return lines, kept, weights(folder)


@pytest.mark.parametrize("step", [1, 7, 8, 10])
@pytest.mark.parametrize("end", ["killed", "terminated"])
def test_an_interrupted_run_repeats_and_loses_no_validation(
    inputs, tmp_path, monkeypatch, step, end
):
    often = 1e-9 if end == "killed" else 60
    given = asked("flame", inputs, checkpoint_minutes=often)
    given |= {"monitoring": monitoring("flame", inputs, keep=2)}
    train(out=tmp_path / "whole", **given)

    def stop():
        if end == "killed":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    calls = []
    real = validation.Validation.__call__

    def counted(self):
        calls.append(self)
        return real(self)

    monkeypatch.setattr(validation.Validation, "__call__", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Tower, "clamp_scale", call_number(step, stop))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(out=tmp_path / "run", **given)
    train(out=tmp_path / "run", **given)
    assert _content(tmp_path / "run") == _content(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "run" / "epochs").iterdir()) == ["2", "3"]
    assert len(calls) == EPOCHS + 1


def test_work_after_the_checkpoint_is_done_again(inputs, tmp_path, monkeypatch):
    """A run is killed long after its last checkpoint, of step 5, and while it keeps weights."""
    given = asked("flame", inputs, checkpoint_minutes=60)
    given |= {"monitoring": monitoring("flame", inputs, keep=2)}
    train(out=tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        patch.setattr(
            Tower, "clamp_scale", call_number(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        )
        with pytest.raises(SystemExit):
            train(out=tmp_path / "run", **given)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flame.train.save", _at(3, killed))
        with pytest.raises(KeyboardInterrupt):
            train(out=tmp_path / "run", **given)
    kept = tmp_path / "run.partial" / "content" / "epochs"
    assert sorted(path.name for path in kept.iterdir()) == ["1", "2", f"3{monitor.ASIDE}"]
    train(out=tmp_path / "run", **given)
    assert _content(tmp_path / "run") == _content(tmp_path / "whole")


def _at(epoch, action):
    """`save`, but for an action at the end of an epoch."""

    def acting(tower, folder, record):
        return action() if record["steps"] == PER_EPOCH * epoch else save(tower, folder, record)

    return acting


def test_two_processes_share_the_images(inputs, tmp_path):
    """23 images, an odd number, on CPUs: BatchNorm's statistics differ between the processes."""
    given = monitoring("flame", inputs, images=IMAGES - 1, every=2)
    wanted = settings(epochs=2, warmup_steps=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "flame.train", "--images", inputs["images"], "--stores", *inputs["stores"]]
    command += ["--out", tmp_path / "run", "--settings", wanted.model_dump_json()]
    command += ["--validation", given.validation.model_dump_json(), "--validation-datasets"]
    command += [inputs["images"], "--validation-stores", *inputs["stores"], "--keep-epochs", "1"]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    logged = validations(tmp_path / "run")
    assert list(logged) == [0, 2]
    alone = _alone(inputs, tmp_path / "run", given)
    assert logged[2] == alone
    assert sorted(path.name for path in (tmp_path / "run" / "epochs").iterdir()) == ["1"]


def _alone(inputs, model, given):
    """The same validation, of a finished run, in one process."""
    tower, record = load(model)
    return validation.Validation(
        tower,
        given.validation,
        given.validation_datasets,
        given.validation_stores,
        place=Place(0, 1, torch.device("cpu")),
        bfloat16=False,
        trained=record["texts"],
    )()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"validation_datasets": ()}, "validation: no data set 'dots'"),
        ({"validation_stores": ()}, "'raw dots': no embeddings of captions of kind 'raw'"),
    ],
)
def test_what_is_wrong_with_a_validation_shows_before_the_first_step(
    inputs, tmp_path, missing, message
):
    given = replace(monitoring("flame", inputs), **missing)
    with pytest.raises(ValueError, match=message):
        train(out=tmp_path / "run", **asked("flame", inputs), monitoring=given)
    assert not (tmp_path / "run.partial" / "content" / "checkpoint.safetensors").exists()


def test_a_profile_has_its_steps_and_changes_no_bit(inputs, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "SKIPPED", 4)
    given = Monitoring(profile_steps=3)
    train(out=tmp_path / "run", **asked("flame", inputs), monitoring=given)
    assert weights(tmp_path / "run") == weights(plain / "flame")
    with gzip.open(tmp_path / "run" / profiling.TRACE) as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8"}
    assert "aten::convolution" in (tmp_path / "run" / profiling.TABLE).read_text()
