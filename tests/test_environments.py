"""Conda environments agree with the lock file and with the imports of the code."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RULES, VLLM = "environment.yml", "workflow/envs/vllm.yml"
# Pinned by the vLLM release: its torch, its transformers, the numpy that its numba supports.
OF_VLLM = {"vllm", "torch", "torchvision", "transformers", "huggingface-hub", "numpy"}
BY_HAND = "What these need"  # ends the handwritten part of an environment
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.0"}  # of both environments


def requirements(file: str) -> list[Requirement]:
    """The pip section of an environment."""
    *conda, last = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    assert all(isinstance(entry, str) for entry in conda)
    return [Requirement(line) for line in last["pip"]]


def is_for_here(package: Requirement, extra: str = "") -> bool:
    """Whether the marker holds for the environments' Python on this machine."""
    return package.marker is None or package.marker.evaluate(PYTHON | {"extra": extra})


def versions(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Name -> pinned version, for this machine."""
    there = filter(is_for_here, wanted)
    return {package.name: str(package.specifier).removeprefix("==") for package in there}


def by_hand(file: str) -> set[str]:
    head = (ROOT / file).read_text().split(BY_HAND)[0]
    return set(re.findall(r"^ +- ([\w-]+)==", head, re.MULTILINE))


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.rstrip("\\") for line in lines if re.match(r"[a-z]", line)]
    return versions(map(Requirement, pins))


def needed() -> set[str]:
    """Dependencies in pyproject.toml that rules need: all but Snakemake and its plugins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(line).name for line in project["dependencies"]}
    return {name for name in names if not name.startswith("snakemake")}


def with_needs(names: Iterable[str]) -> set[str]:
    """Packages and their dependencies, as far as they are installed here."""
    installed = {canonicalize_name(package.name) for package in metadata.distributions()}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        package = todo.pop()
        name, extras = canonicalize_name(package.name), frozenset(package.extras)
        if name not in installed or (name, extras) in seen:
            continue
        seen.add((name, extras))
        needs = map(Requirement, metadata.requires(name) or [])
        todo += [r for r in needs if any(is_for_here(r, extra) for extra in extras or {""})]
    return {name for name, _ in seen}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports anywhere, without the standard library."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"flame"}


# The files.


@pytest.mark.parametrize("file", [RULES, VLLM])
def test_conda_gives_python_and_pip_and_pypi_one_version_of_each_package(file):
    environment = yaml.safe_load((ROOT / file).read_text())
    assert environment["channels"] == ["conda-forge"]
    assert environment["dependencies"][:-1] == ["python=3.11", "pip"]
    pins = requirements(file)
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
    assert len({canonicalize_name(pin.name) for pin in pins}) == len(pins)
    # A pin file would replace the pip section.
    beside = (ROOT / file).with_suffix("")
    assert not [*beside.parent.glob(f"{beside.name}.*.pin.txt")]


def test_the_package_and_the_lock_file_are_made_for_the_environments_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains("3.11")
    assert "--python-version 3.11 " in (ROOT / "Makefile").read_text()


def test_rules_run_with_the_locked_version_of_all_that_they_need():
    assert by_hand(RULES) == needed()
    pins, lock = versions(requirements(RULES)), locked()
    assert pins == {name: lock[name] for name in with_needs(needed())}


def test_captioning_by_vllm_differs_only_in_what_vllm_decides():
    pins, lock = versions(requirements(VLLM)), locked()
    own = by_hand(VLLM) - OF_VLLM
    assert {name: pins[name] for name in own} == {name: lock[name] for name in own}
    assert by_hand(VLLM) >= OF_VLLM


def test_every_package_that_is_imported_is_named():
    packages = metadata.packages_distributions() | {"vllm": ["vllm"]}
    modules = {name for path in (ROOT / "src").rglob("*.py") for name in imported(path)}
    named = needed() | {"vllm"}
    assert not {m for m in modules if named.isdisjoint(map(canonicalize_name, packages[m]))}


# Their use.


def test_every_environment_is_that_of_a_rule():
    rules = [*(ROOT / "workflow/rules").glob("*.smk")]
    asked = {
        (path.parent / name).resolve().relative_to(ROOT).as_posix()
        for path in rules
        for name in re.findall(r'^    conda:\n        "(.+)"$', path.read_text(), re.MULTILINE)
    }
    assert asked == {RULES, VLLM}
    assert {*(ROOT / "workflow/envs").glob("*.yml")} == {ROOT / VLLM}


WITHOUT = """
import json, runpy, sys

class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in refused:
            raise ModuleNotFoundError(f"{name} is not in the environment", name=name)

refused = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Refuse)
sys.argv = [*sys.argv[2:], "--help"]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def without(refused: Iterable[str], stage: str) -> subprocess.CompletedProcess[str]:
    """Output of a stage's --help in an environment without some modules."""
    command = [sys.executable, "-c", WITHOUT, json.dumps(sorted(refused)), stage]
    return subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)


def test_the_environment_of_vllm_has_all_that_captioning_imports():
    there = with_needs(versions(requirements(VLLM)))
    modules = metadata.packages_distributions()
    refused = {m for m in modules if there.isdisjoint(map(canonicalize_name, modules[m]))}
    refused.discard("flame")  # of the environment that runs Snakemake
    assert refused >= {"zarr", "timm", "open_clip", "matplotlib", "snakemake"}
    caption = without(refused, "flame.caption")
    assert caption.returncode == 0, caption.stderr
    assert "join" in caption.stdout
    figure = without(refused, "flame.figure")
    assert "matplotlib is not in the environment" in figure.stderr


def test_without_conda_snakemake_says_so_and_runs_nothing(tmp_path):
    places = os.environ["PATH"].split(os.pathsep)
    bare = [place for place in places if not Path(place, "conda").exists()]
    flags = ["--configfile", "tests/config/tiny.yaml", "--directory", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *flags, "--cores", "1", "--use-conda"],
        cwd=ROOT,
        env=os.environ | {"PATH": os.pathsep.join(bare)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Is conda installed and accessible?" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {".snakemake"}
