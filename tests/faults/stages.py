"""The command of every stage of a small study, and the outputs that it must produce."""

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tests import workflow
from tests.preloaded import Child, Preloaded

STUDY = Path(__file__).with_name("study.yaml")
EXTRA = ("results/export/flame", "results/captions/server/scenes")  # no table asks for these
# Small shards, so that writing a store can be interrupted between two of them.
CONSTANTS = {
    "flame.embedding.store.SHARD_ROWS": 8,
    "flame.embedding.store.CHUNK_ROWS": 8,
    "flame.data.web.BLOCK": 4096,
}
CLOCK = {"seconds", "images_per_second", "data_wait"}  # differ between runs
TIMED = ("  run.json", "  report.json", "  report.md")  # files with such values
# Not results: locks, download records, files of Snakemake and of the tests.
BESIDE = re.compile(
    r"(^|/)(\.flame-lock|\.flame-source\.json|\.snakemake|logs|filler)(/|$)"
    r"|^resources/raw/.*/\.cache/"
)
ORPHAN = re.compile(
    r"\.partial$|\.partial\.tag$|\.incomplete$|^\.tmp|^lease\.(lock|json)|^replaced-"
)


@dataclass(frozen=True)
class Stage:
    """One command of the workflow.

    Args:
        name: of its rule.
        module: that is run.
        arguments: of its command line.
        outputs: files and folders that it makes, relative to where it runs.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """A folder in which every stage ran without faults, and how long each took.

    Args:
        folder: with all inputs and outputs.
        stages: by the name of their rule; where a rule has several jobs, the last of them.
        seconds: of every stage.
        steps: changes that every stage made on disk.
    """

    folder: Path
    stages: Mapping[str, Stage]
    seconds: Mapping[str, float]
    steps: Mapping[str, int]


class Bench:
    """A copy of the reference without the outputs of one stage."""

    def __init__(self, server: Preloaded, reference: Reference, name: str, folder: Path) -> None:
        self.stage, self.reference, self.folder = reference.stages[name], reference, folder
        self._server = server
        self.said = folder.with_name("said")
        shutil.copytree(reference.folder, folder)
        self.clear()

    def clear(self) -> None:
        """Remove the outputs and downloads of the stage."""
        for output in (*self.stage.outputs, "resources/raw"):
            path = self.folder / output
            for found in (path, path.with_name(path.name + ".partial")):
                shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
        for output in self.stage.outputs:
            (self.folder / output).parent.mkdir(parents=True, exist_ok=True)

    def start(self, said: Path | None = None, **how: Any) -> Child:
        """Start the stage, with its output in a file: by default the one behind `words`."""
        log = said or self.said
        log.unlink(missing_ok=True)
        return run(self._server, self.stage, self.folder, log, **how)

    def finish(self) -> None:
        """Run the stage to its end and compare it with the reference."""
        assert self.start().wait() == 0, self.said.read_text()
        self.check()

    def check(self) -> None:
        """Assert that the folder equals the reference and has no leftover files."""
        assert not [*orphans(self.folder)]
        found, wanted = content(self.folder), content(self.reference.folder)
        for path in sorted(found.keys() | wanted.keys()):
            if path in found or not path.startswith("resources/raw/"):
                assert found.get(path) == wanted.get(path), path

    @property
    def seconds(self) -> float:
        """Duration of the stage in the reference run."""
        return self.reference.seconds[self.stage.name]

    @property
    def steps(self) -> int:
        """Number of changes on disk in the reference run."""
        return self.reference.steps[self.stage.name]

    @property
    def sizes(self) -> list[int]:
        """Size in bytes of every output file."""
        made = (self.reference.folder / output for output in self.stage.outputs)
        files = (path for each in made for path in ([each] if each.is_file() else each.rglob("*")))
        return [path.stat().st_size for path in files if path.is_file()]

    @property
    def words(self) -> str:
        """Output of the stage since its last start."""
        return self.said.read_text() if self.said.exists() else ""


def run(server: Preloaded, stage: Stage, folder: Path, log: Path, **how: Any) -> Child:
    """Start a stage."""
    arguments = {"constants": CONSTANTS, **how}
    return server.start(stage.module, stage.arguments, cwd=folder, log=log, **arguments)


def make(server: Preloaded, study: Path, folder: Path, more: Sequence[Stage]) -> Reference:
    """Run every job of the workflow, and some stages more, without faults."""
    stages, seconds, steps = {}, {}, {}
    log = folder.with_name("said")
    for job in (*planned(study, folder), *more):
        outputs = job.outputs if isinstance(job, Stage) else re.findall(r"> (results\S+)", job)
        for output in outputs:
            (folder / output).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(job, str):
            subprocess.run(job.partition(" 2> ")[0], shell=True, cwd=folder, check=True)
            continue
        began = time.monotonic()
        assert run(server, job, folder, log).wait() == 0, log.read_text()
        seconds[job.name] = time.monotonic() - began
        steps[job.name] = log.with_name("said.steps").stat().st_size
        stages[job.name] = job
    return Reference(folder, stages, seconds, steps)


def planned(study: Path, folder: Path) -> list[Stage | str]:
    """The jobs of the workflow in order: stages, and plain shell commands."""
    flags = ("--dry-run", "--printshellcmds", "--", "all", *EXTRA)
    done = workflow.snakemake(folder, study, *flags)
    assert done.returncode == 0, done.stdout
    jobs: list[Stage | str] = []
    for text in re.split(r"^\[.*\]$", done.stdout, flags=re.M):
        shell = re.search(r"^Shell command: (.*?)(?:\n\n|\Z)", text, re.M | re.S)
        rule = re.search(r"^rule (\w+):", text, re.M)
        if rule is None or shell is None or rule[1] == "all":
            continue
        words = shlex.split(shell[1])
        if "-m" not in words:
            jobs.append(shell[1])
            continue
        module, *arguments = words[words.index("-m") + 1 : words.index("2>&1")]
        # Files of this checkout are given relative to the working directory.
        arguments = [str((folder / a).resolve()) if a.startswith("../") else a for a in arguments]
        outputs = tuple(sorted(workflow.named("output", text)))
        jobs.append(Stage(rule[1], module, tuple(arguments), outputs))
    return jobs


# What is the same.


def orphans(folder: Path) -> Iterator[Path]:
    """Files and folders that only a running job may have."""
    return (path for path in folder.rglob("*") if ORPHAN.search(path.name))


def content(folder: Path) -> dict[str, Any]:
    """Path -> content of every finished file, without times and durations."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: _timeless(path)
        for name, path in names.items()
        if not BESIDE.search(name) and not any(map(ORPHAN.search, Path(name).parts))
    }


def _timeless(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_clock(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        about = pl.read_parquet_metadata(path)
        about = {key: value for key, value in about.items() if key != "ARROW:schema"}
        if "flame" in about:
            about["flame"] = json.dumps(_without_clock(json.loads(about["flame"])))
            return about, pl.read_parquet(path).to_dict(as_series=False)
    if path.name == "SHA256SUMS":
        return [line for line in path.read_text().splitlines() if not line.endswith(TIMED)]
    if path.name == "report.md":
        return re.sub(r", [\d.e+]+ images/s", "", path.read_text())
    return path.read_bytes()


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(each) for key, each in value.items() if key not in CLOCK}
    return [_without_clock(each) for each in value] if isinstance(value, list) else value
