"""A stage that is killed at any moment ends, when it is run again, with the same bytes.

A stage is killed, or told to end by SIGTERM as at a scheduler's time limit, at moments that follow
one another on what the last left. A moment is one of two: so many seconds after the start, or
before the n-th change that the stage makes on disk, which also meets what a clock hardly ever does,
such as the instant between two renames. `make test-faults` kills often; a plain test run, once.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults.stages import EXTRA, Bench, content, orphans
from tests.workflow import ROOT, command, snakemake

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
    "claims",
    "variance",
    "export",
]
LEASED = [
    "download_dataset",
    "download_llm",
    "embed_training",
    "caption",
    "captions",
    "train",
    "export",
]
WENT_ON = re.compile(r"^(kept|resuming from) ", re.M)
HOLDING = 4  # step at which each of them has its lease, and has made nothing yet
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # before the stage could see to it, and after


def every(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bench", names, indirect=True, ids=lambda name: name)


def test_every_stage_is_killed(reference):
    assert {*reference.stages} == {*STAGES, "embed"}


@every(*STAGES)
def test_a_stage_that_is_stopped_over_and_over_ends_in_the_same_bytes(bench, draws, tally, kills):
    for way in ways(draws, kills):
        code = stopped(bench, way, draws)
        ends = STOPPED if way == "SIGTERM" else (-signal.SIGKILL,)
        assert code in (0, *ends), bench.words
        assert "Traceback" not in bench.words
        account(bench, tally, way if code else "was done")
    assert bench.start().wait() == 0, bench.words
    account(bench, tally)
    bench.check()


def ways(draws: Random, kills: int) -> list[str]:
    """The ways in which to stop a stage, in order."""
    if not kills:
        return draws.sample([draws.choice(["by clock", "by step"]), "SIGTERM"], 2)
    return draws.choices(["by clock", "by step", "SIGTERM"], [2, 2, 1], k=kills)


def stopped(bench: Bench, way: str, draws: Random) -> int:
    """Start a stage and stop it unless it finishes first; returns its exit status."""
    if way == "by step":
        return bench.start(step=draws.randint(1, bench.steps)).wait()
    child = bench.start()
    time.sleep(draws.uniform(0, bench.seconds))
    if way == "by clock":
        return child.kill()
    os.kill(child.pid, signal.SIGTERM)  # once more below: both a scheduler and Snakemake send it
    time.sleep(draws.uniform(0, 0.02))
    return child.kill(signal.SIGTERM)


def account(bench: Bench, tally, what: str | None = None) -> None:
    """Count how a run ended, and whether it resumed an earlier one.

    A run that was done too early to be killed is held against the reference, and taken away.
    """
    if what:
        tally.add(bench.stage.name, what)
    if WENT_ON.search(bench.words):
        tally.add(bench.stage.name, "went on")
    if what == "was done":
        bench.check()
        bench.clear()


# Two at once.


@every(*LEASED)
def test_a_second_one_on_the_same_output_is_refused_by_name(bench):
    first = bench.start(step=HOLDING, sends=signal.SIGSTOP)
    wait_until(lambda: state(first.pid) == "T")
    other = bench.folder.with_name("other")
    second = bench.start(said=other)
    assert second.wait() == 1
    last = other.read_text().splitlines()[-1]
    assert re.match(rf"\w+: error: .*\.partial is being written by process {first.pid} on ", last)
    assert "Traceback" not in other.read_text()
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, bench.words
    bench.check()


def test_a_second_snakemake_is_told_that_the_folder_is_locked(study, tmp_path):
    target = "resources/datasets/tints"
    first = workflow(tmp_path / "run", study, target)
    aside = tmp_path / f"run/{target}.partial"
    wait_until(lambda: aside.exists() or first.poll() is not None)
    os.killpg(first.pid, signal.SIGSTOP)  # it goes on once the second one was there
    second = snakemake(tmp_path / "run", study, "--cores", "1", "--", target)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 1
    assert "Directory cannot be locked" in second.stdout
    assert "Traceback" not in second.stdout
    assert first.wait() == 0
    assert (tmp_path / "run" / target / "manifest.json").exists()
    assert not [*orphans(tmp_path / "run")]


def state(pid: int) -> str:
    """State of a process as one letter, from /proc."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# The workflow as a whole.


def test_a_study_that_is_killed_over_and_over_ends_in_the_same_bytes(
    study, draws, tally, kills, tmp_path
):
    """`kill -9` of Snakemake and all its jobs, as in a power cut."""
    if not kills:
        pytest.skip("only with --kills: test_workflow.py kills one such run")
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    assert workflow(undisturbed, study, "all", *EXTRA).wait() == 0
    seconds = time.monotonic() - began
    for _ in range(max(3, kills // 4)):
        process = workflow(folder, study, "all", *EXTRA)
        try:
            time.sleep(draws.uniform(0, seconds / 2))
        finally:
            killed = process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tally.add("snakemake", "by clock" if killed else "was done")
        assert snakemake(folder, study, "--unlock").returncode == 0
    assert workflow(folder, study, "all", *EXTRA).wait() == 0
    assert not [*orphans(folder)]
    assert content(folder) == content(undisturbed)


def workflow(folder: Path, study: Path, *targets: str) -> subprocess.Popen[bytes]:
    """Start a run of the workflow, with all its processes in one new session."""
    folder.mkdir(exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command(folder, study, "--cores", "2", "--", *targets),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
