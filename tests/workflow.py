"""Runs of the workflow through Snakemake's command line, and what its output says of them."""

import atexit
import copy
import fnmatch
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml
from filelock import FileLock

from tests.preloaded import Interpreter, Preloaded

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests/config/tiny.yaml"
WHOLE = ROOT / "tests/config/whole.yaml"
SNAKEMAKE = ["snakemake.cli", "snakemake.workflow", "snakemake.executors.local"]
STUDY = ["flame.study.load", "flame.study.settings", "flame.runtime.failures"]


def command(folder: Path, study: Path | None = TINY, *flags: str) -> list[str]:
    """Command line of Snakemake for a study, with its results in a folder."""
    return [sys.executable, "-m", "snakemake", *_arguments(folder, study, flags)]


def _arguments(folder: Path, study: Path | None, flags: Iterable[str]) -> list[str]:
    chosen = [] if study is None else ["--configfile", str(study)]
    return ["--directory", str(folder), *chosen, *flags]


def snakemake(
    folder: Path,
    study: Path | None,
    *flags: str,
    root: Path = ROOT,
    fresh: bool = False,
    jobs: Interpreter | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake to its end, with both of its streams in `stdout`, as on a terminal.

    Args:
        folder: of its results.
        study: its `--configfile`; None for that of the profile.
        flags: more of the command line.
        root: the checkout to run; one other than this is always run in a fresh interpreter.
        fresh: start an interpreter, as users do, instead of forking one that has imported
            Snakemake. Imports take more than half of the time of a dry run.
        jobs: the Python that runs the jobs, if another than that of the tests.
    """
    if fresh or root != ROOT:
        arguments = command(folder, study, *flags)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(arguments, cwd=root, text=True, **streams)
    arguments = _arguments(folder, study, flags)
    with tempfile.TemporaryDirectory() as aside:
        log = Path(aside, "log")
        interpreter = jobs and jobs.path
        how = {"cwd": ROOT, "log": log, "interpreter": interpreter}
        code = _preloaded().start("snakemake", arguments, **how).wait()
        return subprocess.CompletedProcess(arguments, code, log.read_text())


@functools.cache
def _preloaded() -> Preloaded:
    """The process that Snakemake is forked from; it ends with this one."""
    server = Preloaded([*SNAKEMAKE, *STUDY])
    atexit.register(server.close)
    return server


def named(kind: str, text: str) -> set[str]:
    """Files that Snakemake's description of jobs lists as their `input`, `output` or `log`."""
    return {
        path for line in re.findall(rf"^    {kind}: (.+)$", text, re.M) for path in line.split(", ")
    }


def planned(folder: Path, study: Path, *flags: str, root: Path = ROOT) -> set[str]:
    """Files that a run would make."""
    done = snakemake(folder, study, "--dry-run", *flags, root=root)
    assert done.returncode == 0, done.stdout
    files = named("output", done.stdout)
    assert files or "Nothing to be done" in done.stdout, done.stdout
    return files


def matching(files: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Files that match one of the patterns."""
    return {file for p in patterns for file in fnmatch.filter(files, p)}


def changed(to: Path, *changes: tuple[str, object]) -> Path:
    """The tiny study with other values, each under its dotted path; None removes the key."""
    values = copy.deepcopy(yaml.safe_load(TINY.read_text()))
    for path, value in changes:
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section[int(parent) if isinstance(section, list) else parent]
        if value is None:
            del section[key]
        else:
            section[key] = value
    to.write_text(yaml.safe_dump(values, sort_keys=False))
    return to


def alone(folder: Path) -> FileLock:
    """Keep other workers from running the workflow in a folder; dry runs need no such care."""
    return FileLock(folder.with_name(f"{folder.name}.run"))


def content(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
