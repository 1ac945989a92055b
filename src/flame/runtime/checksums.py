"""Files that are known again when they are read, and errors that name the one that is broken."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flame.runtime.resumable import write_atomic

SUMS = "SHA256SUMS"  # in a folder: the digests of its files, as `sha256sum -c` reads them


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write down the digests of files, by which `verified` knows them again.

    Args:
        folder: theirs.
        names: of the files in it, which are not written to any more; by default of all.
    """
    found = [path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(names or found)]
    write_atomic(folder / SUMS, "".join(lines).encode())


def verified(path: Path) -> Path:
    """A file, once it is known to be the one that was sealed.

    A folder without digests (placed by hand, or older than they are) is taken as it is.

    Raises:
        ValueError: the file is broken, or what was written down of it.
    """
    sums = path.parent / SUMS
    if not sums.exists():
        return path
    wanted = _digests(sums).get(path.name)
    found = sha256(path)
    if found != wanted:
        raise ValueError(
            f"{path} is broken: its sha256 is {found}, {SUMS} beside it has {wanted}; "
            f"delete {path.parent} to make it anew"
        )
    return path


def verify(folder: Path) -> None:
    """Compare all files of a folder that was sealed with their digests.

    Raises:
        ValueError: one of them is broken, by name.
    """
    if (folder / SUMS).exists():
        for name in _digests(folder / SUMS):
            verified(folder / name)


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: it is broken, by name.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}; delete it to make it anew") from error


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


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file, for fingerprints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
