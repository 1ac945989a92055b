"""Batches that workers read ahead: the same ones, and what happens when reading fails."""

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flame.data.pixels import ImageError
from flame.training import loader as loading
from flame.training.batches import WorkItem, read
from flame.training.loader import loader

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
BATCH, SIZE, STEPS = 150, 4, 5  # three items a batch, the last one of 22 images


def numbers(step: int, rows: slice) -> np.ndarray:
    """Images (n, 3, SIZE, SIZE) that differ by step and row."""
    values = np.random.default_rng(step).integers(256, size=(BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    return values[rows]


def process(rows: slice) -> np.ndarray:
    """Number of the process that reads, (n, 1, 1)."""
    time.sleep(0.2)  # as if it was hard
    return np.full((rows.stop - rows.start, 1, 1), os.getpid(), np.int32)


def broken() -> np.ndarray:
    raise ImageError("image 'k7' in shard-0.tar: broken")


class Numbers:
    """A schedule of numbers in place of images."""

    facets, steps_per_epoch, local_batch_size, cached = [("raw", "a")], STEPS, BATCH, False

    def __init__(self, texts=process, images=numbers):
        self.texts, self.images = texts, images

    def __len__(self):
        return STEPS

    def item(self, step, rows):
        return WorkItem(partial(self.images, step, rows), (partial(self.texts, rows),))

    def columns(self, step):
        return torch.tensor([step])


def test_workers_read_the_same_batches_in_small_items():
    schedule = Numbers()
    with loader(schedule, first=2, workers=2) as batches:
        found = list(batches)
    assert len(found) == STEPS - 2
    for step, batch in enumerate(found, start=2):
        expected = read(schedule, step)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.columns, expected.columns)
    # All workers read parts of one batch, and each part is of one worker.
    readers = found[0].texts.flatten()
    assert len(set(readers.tolist())) == 2
    assert os.getpid() not in readers
    assert all(len(set(part.tolist())) == 1 for part in readers.split(loading.ITEM))


PROGRAM = """
import polars
from tests.training.test_loader import Numbers, heavy
from flame.training.loader import loader

with loader(Numbers(texts=heavy), first=4, workers=1) as batches:
    print(*{int(text) for batch in batches for text in batch.texts.flatten()})
"""


def heavy(rows: slice) -> np.ndarray:
    """Number of large modules that the reading process has imported, (n, 1, 1)."""
    loaded = {"open_clip", "polars", "timm", "transformers", "zarr"} & {*sys.modules}
    return np.full((rows.stop - rows.start, 1, 1), len(loaded), np.int32)


def test_a_worker_of_a_training_does_not_import_its_program(tmp_path):
    """Its imports take more memory than all that a worker needs."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "0\n", done.stderr


def test_what_a_worker_cannot_read_is_told_in_one_line():
    schedule, told = Numbers(images=partial(_fail_at, 3)), r"^image 'k7' in shard-0\.tar: broken$"
    with loader(schedule, workers=2) as batches, pytest.raises(ImageError, match=told):
        list(batches)


def _fail_at(wanted, step, rows):
    return broken() if step == wanted else numbers(step, rows)


def test_a_read_that_hangs_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(loading, "DEADLINE", 1)
    monkeypatch.setattr(loading, "PATIENCE", 2)
    hanging = Numbers(images=_sleep)
    start = time.monotonic()
    told = "no worker has read 64 images within 1 s.*room in /dev/shm"
    with loader(hanging, workers=1) as batches, pytest.raises(TimeoutError, match=told):
        list(batches)
    assert time.monotonic() - start < 60


def _sleep(step, rows):
    time.sleep(1000)


FULL = """
from tests.training.test_loader import Numbers, large
from flame.training.loader import loader

with loader(Numbers(images=large, texts=large), workers=2) as batches:
    for batch in batches:
        pass
"""
LARGE = 10 << 20


def large(*args) -> np.ndarray:
    return np.zeros((args[-1].stop - args[-1].start, 1, 1, LARGE // loading.ITEM), np.uint8)


def test_full_shared_memory_is_named_at_once(tmp_path):
    """In a mount namespace of its own, with the 64 MB of a Docker container."""
    program = tmp_path / "full.py"
    program.write_text(FULL)
    small = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    allowed = subprocess.run([*command, small + "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"no small /dev/shm here: {allowed.stderr.decode()}")
    done = subprocess.run(
        [*command, f"{small}{sys.executable} {program}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert re.search(r"no room for \d+ MB in /dev/shm, which has \d+ of 67 MB free: enlarge", last)
