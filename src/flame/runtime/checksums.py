"""Checksums of files: written once, compared on every read, with errors that name the file."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flame.runtime.resumable import write_atomic

SUMS = "SHA256SUMS"  # in a folder: the digests of its files, in the format of `sha256sum -c`


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the digests that `verified` compares with.

    Args:
        folder: of the files.
        names: files in it that are final; all of them by default.
    """
    found = [path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(names or found)]
    write_atomic(folder / SUMS, "".join(lines).encode())


def verified(path: Path) -> Path:
    """The path itself, once the file has the digest that was sealed.

    A folder without digests (placed by hand, or made before they existed) is accepted as it is.

    Raises:
        ValueError: the file or its recorded digest is corrupt.
    """
    sums = path.parent / SUMS
    if not sums.exists():
        return path
    wanted = _digests(sums).get(path.name)
    found = sha256(path)
    if found != wanted:
        raise ValueError(
            f"{path} is broken: its sha256 is {found}, {SUMS} beside it has {wanted}; "
            f"delete {path.parent} and run again"
        )
    return path


def verify(folder: Path) -> None:
    """Compare all sealed files of a folder with their digests.

    Raises:
        ValueError: one of them is corrupt, by name.
    """
    if (folder / SUMS).exists():
        for name in _digests(folder / SUMS):
            verified(folder / name)


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: it is not JSON, by name.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}; delete it and run again") from error


@contextmanager
def utf8(path: Path) -> Iterator[TextIO]:
    """A text file, open for reading.

    Raises:
        ValueError: what is read of it is not UTF-8, by name.
    """
    with path.open(encoding="utf-8") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error


def _digests(sums: Path) -> dict[str, str]:
    lines = sums.read_text(errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
