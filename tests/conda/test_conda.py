"""`--use-conda` with everything but a real channel: `make test-conda`.

A stand-in for conda makes the environment, of 6.5 GB: Python and pip from a channel of our own, the
rest from PyPI. So all is tried but whether conda-forge has its Python and pip.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOLS = ROOT / ".venv-conda/bin/python"
TINY = ROOT / "tests/config/tiny.yaml"
TABLE = "results/table6.csv"

pytestmark = pytest.mark.conda

Snakemake = Callable[..., str]


def pip_section(file: str) -> list[str]:
    environment = yaml.safe_load((ROOT / file).read_text())
    return next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of these tests, removed at the end because it is large."""
    folder = tmp_path_factory.mktemp("conda")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def snakemake(folder: Path) -> Snakemake:
    """Snakemake, where `conda` is the stand-in and only the environment has a working `python`."""
    subprocess.run([TOOLS, HERE / "channel.py", folder / "channels/conda-forge"], check=True)
    outside = folder / "outside/python"
    outside.parent.mkdir()
    outside.write_text("#!/bin/sh\necho 'this job is outside of its environment' >&2\nexit 1\n")
    outside.chmod(0o755)
    places = [str(outside.parent), str(HERE / "bin"), os.environ["PATH"]]
    variables = os.environ | {
        "PATH": os.pathsep.join(places),
        "CONDA_CHANNEL_ALIAS": (folder / "channels").as_uri(),
        "CONDA_PKGS_DIRS": str(folder / "packages"),
    }

    def run(results: Path, *flags: str, study: Path = TINY) -> str:
        command = [sys.executable, "-m", "snakemake", "--directory", str(results)]
        done = subprocess.run(
            [*command, "--configfile", str(study), *flags],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="module")
def with_conda(folder: Path) -> list[str]:
    """Flags for a run with conda."""
    return ["--use-conda", "--conda-prefix", str(folder / "environments")]


@pytest.fixture(scope="module")
def by_conda(folder: Path, snakemake: Snakemake, with_conda: list[str]) -> Path:
    """Results of the tiny study with conda; Snakemake's output is in `said.txt`."""
    results = folder / "by-conda"
    said = snakemake(results, "--cores", "2", *with_conda, TABLE)
    (results / "said.txt").write_text(said)
    return results


@pytest.fixture(scope="module")
def environment(folder: Path, by_conda: Path) -> Path:
    """The only environment that was created."""
    (done,) = (folder / "environments").glob("*.env_setup_done")
    return done.with_suffix("").resolve()


@pytest.fixture(scope="module")
def without_conda(folder: Path, snakemake: Snakemake) -> Path:
    """Results of the tiny study without conda."""
    results = folder / "without-conda"
    snakemake(results, "--cores", "2", TABLE)
    return results


def test_the_environment_is_what_its_file_names_and_nothing_else(environment):
    copied = environment.with_name(f"{environment.name}.yaml")
    assert copied.read_text() == (ROOT / "environment.yml").read_text()
    assert (environment / "conda-meta").is_dir()

    pip = [environment / "bin/python", "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(pip, stdout=subprocess.PIPE, check=True).stdout)
    found = {package["name"]: package["version"].split("+")[0] for package in listed}
    assert found.pop("pip")
    named = map(Requirement, pip_section("environment.yml"))
    wanted = {r.name: str(r.specifier) for r in named if not r.marker or r.marker.evaluate()}
    same = {re.sub(r"[-_.]+", "-", name).lower(): f"=={v}" for name, v in found.items()}
    assert same == wanted


def test_every_job_ran_in_the_environment(by_conda, environment):
    """Snakemake says so, and any `python` outside of it would have failed."""
    said = (by_conda / "said.txt").read_text()
    activated = re.findall(r"^Activating conda environment: (.+)$", said, re.MULTILINE)
    assert {(by_conda / path).resolve() for path in activated} == {environment}
    finished = re.findall(r"^Finished jobid: \d+ \(Rule: \w+\)$", said, re.MULTILINE)
    assert len(activated) == len(finished) > 20
    assert f" {sys.executable} -m flame" not in said


def test_the_table_is_that_of_a_run_without_conda(by_conda, without_conda):
    for file in (TABLE, "results/table6.md"):
        assert (by_conda / file).read_bytes() == (without_conda / file).read_bytes()


def test_conda_is_no_reason_to_run_anew(snakemake, with_conda, by_conda, without_conda):
    for results, flags in [(by_conda, []), (by_conda, with_conda), (without_conda, with_conda)]:
        assert "Nothing to be done" in snakemake(results, "--cores", "2", *flags, TABLE)


def test_the_papers_study_asks_for_both_environments(folder, snakemake):
    said = snakemake(folder / "paper", "-n", "--use-conda", study=ROOT / "config/paper.yaml")
    asked = re.findall(r"^Conda environment (.+) will be created\.$", said, re.MULTILINE)
    assert {Path(path).name for path in asked} == {"environment.yml", "vllm.yml"}


@pytest.mark.parametrize("file", ["environment.yml", "workflow/envs/vllm.yml"])
def test_pypi_has_all_that_is_pinned_and_it_goes_together(file):
    """Nothing is installed; `uv` resolves the pins and adds no package."""
    named = map(Requirement, pip_section(file))
    pins = {f"{r.name}{r.specifier}" for r in named if not r.marker or r.marker.evaluate()}
    options = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_31"]
    resolved = subprocess.run(
        ["uv", "pip", "compile", "-", *options, "--no-header", "--no-annotate"],
        input="\n".join(pins),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    assert set(resolved.split()) == pins
