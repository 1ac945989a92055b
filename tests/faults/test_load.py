"""Memory does not grow with the data, and the paper study is planned within seconds."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workflow import snakemake

ROOT = Path(__file__).parents[2]
ROWS, DIM = 1_000_000, 128
VECTORS = 2 * ROWS * DIM / 1e6  # MB, 256
# Limits: about ten times what was measured for GROWTH, and one and a half times for A_ROW.
GROWTH = (
    VECTORS / 4
)  # MB over what is held once a store is open; all vectors would be four times it
A_ROW = 600  # bytes that an open store, joined to its images, may hold of each row: mostly its key

# Run in processes of their own, because the peak memory of a process never falls.
PREAMBLE = f"""
import json, sys
from pathlib import Path
import numpy as np, torch
from flame.embedding import store
from flame.training.pairs import Batches, Pairs
ROWS, DIM, folder = {ROWS}, {DIM}, Path(sys.argv[1])
KEYS = [f"k{{i:06d}}" for i in range(ROWS)]
told = {{}}

def tell(name):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    # MB: the highest since the last time, and what is held now
    told[name] = [int(status[which].split()[0]) / 1000 for which in ("VmHWM", "VmRSS")]
    Path("/proc/self/clear_refs").write_text("5")

tell("imported")
"""
WRITE = """
store.CHUNK_ROWS, store.SHARD_ROWS = 128, 4096  # fewer files, to save the time of the test
store.create(folder, {"kind": "raw", "facets": {"scene": ""}, "part": 0, "parts": 1})
writer = store.Writer(folder, "many", keys=KEYS, facets=["scene"], dim=DIM)
missing = writer.missing()
tell("opened")
for rows in missing:
    numbers = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None, None]
    writer.write(rows, np.broadcast_to(numbers % 256, (len(rows), 1, DIM)))
tell("written")
print(json.dumps(told))
"""
SAMPLE = """
class Images:
    keys, drawings = KEYS, 1

    def request(self, rows, size, resize, drawing):
        return lambda: (rows % 256).astype(np.uint8).reshape(-1, 1, 1, 1)

embeddings = store.Embeddings.open([folder], "many")
stores, targets = {"raw": embeddings}, {"raw": ("scene",)}
pairs = Pairs(Images(), stores, targets, image_size=1, max_skipped=0)
batches = Batches(pairs, batch_size=2000, epochs=2, seed=0)
batches[0]
tell("opened")
for step in range(0, len(batches), 50):
    batch = batches[step]
    assert torch.equal(batch.texts[:, 0, DIM - 1].int(), batch.images[:, 0, 0, 0].int()), step
assert np.isclose(embeddings.mean(), (np.arange(ROWS) % 256).mean()).all()
tell("sampled")
print(json.dumps(told | {"used": pairs.used}))
"""


def memory(program: str, folder: Path) -> dict[str, Any]:
    """Peak and current memory in MB after every section of a program."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program, folder],
        env={"PYTHONPATH": "src", "PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load") / "0.zarr"


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Any]:
    return memory(WRITE, folder)


def test_a_million_rows_are_written_in_flat_memory(written, folder, record_property):
    record_property("MB", written)
    assert sum(path.stat().st_size for path in folder.rglob("*")) > 1e6 * VECTORS
    assert written["written"][0] - written["opened"][1] < GROWTH


def test_a_million_rows_are_joined_and_drawn_from_in_flat_memory(written, folder, record_property):
    found = memory(SAMPLE, folder)
    record_property("MB", found)
    assert found["used"] == ROWS
    assert found["opened"][0] - found["imported"][1] < A_ROW * ROWS / 1e6
    assert found["sampled"][0] - found["opened"][1] < GROWTH


def test_a_plan_of_the_papers_size_takes_seconds(tmp_path, record_property):
    """Measured in CPU time, because the machine may be busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ("--quiet", "rules", "--dry-run")
    done = snakemake(tmp_path, ROOT / "config/paper.yaml", *flags, fresh=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout
    jobs = int(re.search(r"^total +(\d+)$", done.stdout, re.M)[1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record_property("jobs, seconds", (jobs, seconds))
    assert jobs > 500
    assert seconds < 120
