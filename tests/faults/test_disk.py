"""A full or read-only disk ends a stage with a one-line error and loses no finished work."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.stages import Bench, content, orphans

STAGES = [
    "download_dataset",
    "download_dataset hub",
    "download_dataset archives",
    "download_llm",
    "download_llm hub",
    "embed_training",
    "caption",
    "captions",
    "train",
    "evaluate",
    "fewshot",
    "table",
    "figure",
    "export",
]
PAGE = 4096
NAMED = r": '(resources|results)/[^']+'$"
FULL = re.compile(f"(No space left on device|needs .* GB, .* are free).*{NAMED}")
LIMITED = re.compile(f"File too large.*{NAMED}")


@pytest.mark.parametrize("bench", STAGES, indirect=True, ids=lambda name: name)
def test_no_room_is_one_line_and_no_loss(bench, draws, tally, kills):
    """On a small disk that another program fills, and with a limited file size, as with a quota."""
    largest, pages = max(bench.sizes), sum(-(-size // PAGE) for size in bench.sizes)
    with small_disk(bench) as disk:
        for _ in range(kills // 4 or 1):
            if disk is not None:
                fill(disk, leave=PAGE * draws.randrange(pages))
                told = stopped(bench, tally)
                assert told is None or FULL.search(told), told
                (disk / "filler").unlink()
            if largest > PAGE:  # the limit holds for the log, too
                told = stopped(bench, tally, file_limit=draws.randint(PAGE, largest - 1))
                assert told is None or LIMITED.search(told), told
        bench.finish()


@pytest.mark.parametrize("bench", ["embed_training", "evaluate"], indirect=True)
def test_a_folder_that_may_only_be_read_is_one_line_and_stays_as_it_was(bench):
    before = content(bench.folder)
    with read_only(bench.folder):
        assert bench.start().wait() == 1
        assert re.search(r"Read-only file system: '|Permission denied: '", one_line(bench))
        assert content(bench.folder) == before
        assert not [*orphans(bench.folder)]
    bench.finish()


# What a stage left and said.


def stopped(bench: Bench, tally, **how: Any) -> str | None:
    """Run a stage that is short of space: its error, or None if it finished nevertheless.

    Every output that exists under its final name must be complete.
    """
    code = bench.start(**how).wait()
    assert code in (0, 1), bench.words
    found, wanted = content(bench.folder), content(bench.reference.folder)
    for path in found:
        assert found[path] == wanted.get(path), path
    tally.add(bench.stage.name, "no room" if code else "was done")
    if code == 0:
        bench.check()
        bench.clear()
        return None
    return one_line(bench)


def one_line(bench: Bench) -> str:
    """The error line that the stage ended with."""
    assert "Traceback" not in bench.words, bench.words
    errors = re.findall(r"^\w+: error: .*$", bench.words, re.M)
    assert len(errors) == 1, bench.words
    assert bench.words.rstrip().endswith(errors[0]), bench.words
    return errors[0]


# Disks.


@contextmanager
def small_disk(bench: Bench) -> Iterator[Path | None]:
    """A small disk mounted at the output folder; None where mounting is not allowed."""
    place = bench.folder / Path(bench.stage.outputs[0]).parts[0]
    inputs = place.with_name("inputs")
    place.rename(inputs)
    place.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place))
    try:
        subprocess.run(["cp", "-a", f"{inputs}/.", str(place)], check=True)
        shutil.rmtree(inputs)
        yield place if mounted else None
    finally:
        if mounted:
            unmount(place)


def fill(disk: Path, leave: int) -> None:
    """Fill a disk except for the given number of bytes."""
    free = os.statvfs(disk).f_bavail * PAGE
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only: by a mount for root, for whom permissions do not hold."""
    if os.geteuid() == 0:
        if not mount("--bind", str(folder), str(folder)):
            pytest.skip("mounting is not allowed here, and root may write anywhere else")
        try:
            assert mount("-o", "remount,bind,ro", str(folder))
            yield
        finally:
            unmount(folder)
        return
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True)
