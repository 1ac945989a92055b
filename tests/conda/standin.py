"""A stand-in for conda without network: only the commands that Snakemake calls.

The conda part of an environment is solved and installed by rattler, which is what pixi and others
do it with; the pip part by the environment's own pip, as conda does. A channel's name means a
folder under CONDA_CHANNEL_ALIAS, as it does to conda.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rattler import VirtualPackage, install, solve

PREFIX = Path(__file__).parent  # where Snakemake looks for `bin/activate`
VERSION = "24.11.3"  # Snakemake refuses those before 24.7.1
PLATFORMS = ["linux-64", "noarch"]


async def install_packages(specs: list[str], channels: list[str], prefix: str) -> None:
    """Make an environment at `prefix` from packages of channels."""
    alias = os.environ["CONDA_CHANNEL_ALIAS"]
    records = await solve(
        sources=[f"{alias}/{channel}" for channel in channels],
        specs=specs,
        platforms=PLATFORMS,
        virtual_packages=VirtualPackage.detect(),
    )
    cache = os.environ["CONDA_PKGS_DIRS"]
    await install(records=records, target_prefix=prefix, cache_dir=cache, show_progress=False)


def create(file: Path, prefix: str) -> None:
    """Make the environment that `file` describes."""
    environment = yaml.safe_load(file.read_text())
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    asyncio.run(install_packages(packages, environment["channels"], prefix))
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            install_by_pip(entry["pip"], file.parent, prefix)


def install_by_pip(lines: list[str], folder: Path, prefix: str) -> None:
    """Install with the environment's pip, from the folder of its file, as conda does."""
    with tempfile.NamedTemporaryFile("w", suffix=".requirements.txt", dir=folder) as file:
        file.write("\n".join(lines))
        file.flush()
        pip = [f"{prefix}/bin/python", "-m", "pip", "install", "-U", "-r", file.name]
        subprocess.run(pip, cwd=folder, check=True)


def main(arguments: list[str]) -> None:
    """Run a command as conda would."""
    if arguments == ["--version"]:
        print("conda", VERSION)
    elif arguments == ["info", "--json"]:
        print(json.dumps({"conda_prefix": str(PREFIX), "platform": PLATFORMS[0]}))
    elif arguments[:3] == ["config", "--get", "channel_priority"]:
        print(json.dumps({"get": {"channel_priority": "strict"}}))
    elif arguments[:2] == ["env", "create"]:
        parser = argparse.ArgumentParser()
        for flag in ("--quiet", "--no-default-packages"):
            parser.add_argument(flag, action="store_true")
        parser.add_argument("--file", type=Path, required=True)
        parser.add_argument("--prefix", required=True)
        asked = parser.parse_args(arguments[2:])
        create(asked.file.resolve(), asked.prefix)
    elif arguments == ["clean", "-y", "--tarballs"]:
        for package in Path(os.environ["CONDA_PKGS_DIRS"]).glob("*.conda"):
            package.unlink()
    else:
        sys.exit(f"this stand-in for conda does not know: {' '.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
