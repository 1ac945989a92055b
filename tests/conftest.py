"""What several test files share: finished studies, the real LLM, and where tests run.

With `--numprocesses` the tests of one file run in one worker, since they share its fixtures; the
fixtures here are made once for all workers.
"""

import os

# As many threads as workers would share the cores with as many threads again. Before torch starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from flame import download
from flame.study.load import load_file
from tests.preloaded import STAGES, Interpreter
from tests.workflow import ROOT, TINY, WHOLE, snakemake

# Files that take longest, in this order: a worker that started one of them last would be alone.
LONGEST = [
    "tests/test_loopback.py",
    "tests/faults/test_kills.py",
    "tests/faults/test_disk.py",
    "tests/report/test_paper.py",
    "tests/embedding/test_llm.py",
]
# Files whose tests share nothing but what is made once, so that workers may share them.
SPREAD = ["tests/test_workflow.py", "tests/report/test_paper.py"]
# These share a reference that belongs to a server of one process.
TOGETHER = {"tests/faults/test_disk.py": "tests/faults/test_kills.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests, and group them for `--dist loadgroup`."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        if file not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(TOGETHER.get(file, file)))
    rank = {file: i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder by its name, filled by whichever worker asks for it first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def finished(once) -> Path:
    """Folder of the finished tiny study, not to be changed; Snakemake's output is in `said.txt`."""

    def run(folder: Path) -> None:
        with Interpreter(STAGES) as jobs:
            done = snakemake(folder, TINY, "--cores", "2", jobs=jobs)
        assert done.returncode == 0, done.stdout
        (folder / "said.txt").write_text(done.stdout)

    return once("finished", run)


@pytest.fixture(scope="session")
def whole(once) -> Path:
    """Folder of the finished study with every kind of run, benchmark, table and figure."""

    def run(folder: Path) -> None:
        with Interpreter(STAGES) as jobs:
            done = snakemake(folder, WHOLE, "--cores", "2", jobs=jobs)
        assert done.returncode == 0, done.stdout

    return once("whole", run)


@pytest.fixture(scope="session")
def smollm2(once) -> Path:
    """SmolLM2-135M, as the workflow left it or converted for this run of the tests."""
    cached = ROOT / "resources/llms/smollm2-135m"
    if (cached / "flame.json").exists():
        return cached
    checkpoint = load_file(ROOT / "config/config.yaml", ROOT).llms["smollm2-135m"].checkpoint
    return once("llms", lambda folder: download.llm(checkpoint, folder / "smollm2")) / "smollm2"
