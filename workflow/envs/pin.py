"""Pin the dependencies of a conda environment's pip packages.

    python workflow/envs/pin.py FILE [options of `uv pip compile`]

The first part of the pip section is written by hand; `make lock` calls this to write what follows
`NEEDED`. Snakemake's own pin files do not cover the pip section.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from packaging.requirements import Requirement

NEEDED = "      # What these need, by `make lock`:\n"
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.0"}
LINUX = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine}
    for machine in ("x86_64", "aarch64")
]
MAC = [{"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}]
MACHINES = LINUX + MAC


def pip_section(text: str) -> list[str]:
    """Lines of an environment's pip section."""
    dependencies = yaml.safe_load(text)["dependencies"]
    return next(entry["pip"] for entry in dependencies if isinstance(entry, dict))


def line(package: Requirement) -> str | None:
    """The line of a package in the environment; None if no machine needs it."""
    there = [
        machine
        for machine in MACHINES
        if package.marker is None or package.marker.evaluate(PYTHON | machine)
    ]
    if not there:
        return None
    assert there in (MACHINES, LINUX), f"{package}: neither everywhere nor on all of Linux"
    pin = f"{package.name}{package.specifier}"
    return pin if there == MACHINES else f"{pin} ; sys_platform == 'linux'"


def resolve(pins: list[str], options: list[str]) -> list[str]:
    """Pins with those of all dependencies, and the machines that they apply to."""
    machines = [
        f"python_version == '3.11' and sys_platform == '{machine['sys_platform']}'"
        f" and platform_machine == '{machine['platform_machine']}'"
        for machine in MACHINES
    ]
    command = ["uv", "pip", "compile", "-", "--python-version", "3.11"]
    form = ["--no-header", "--no-annotate"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(
            f"tool.uv.environments = {json.dumps(machines)}\n"
        )
        resolved = subprocess.run(
            [*command, *form, *options],
            cwd=folder,
            input="\n".join(pins),
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return resolved.stdout.splitlines()


def pinned(text: str, options: list[str]) -> str:
    """The environment with the second part of its pip section rewritten."""
    by_hand = text.split(NEEDED)[0]
    named = pip_section(by_hand)
    lines = [line(Requirement(entry)) for entry in resolve(named, options)]
    needed = [entry for entry in lines if entry and entry not in named]
    return by_hand + NEEDED + "".join(f"      - {entry}\n" for entry in needed)


if __name__ == "__main__":
    file, *options = sys.argv[1:]
    Path(file).write_text(pinned(Path(file).read_text(), options))
