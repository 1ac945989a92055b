"""Checksums of files: written once, compared on every read, with errors that name the file.

A large file is hashed only when its size or its time of change is not that of the last time it was
hashed, as `git status` does: 200 jobs that read an LLM of 49 GB hash it once. What changes on a
disk without the file system's knowledge is found by `sha256sum --check SHA256SUMS`.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from flame.runtime.resumable import write_atomic

SUMS = "SHA256SUMS"  # in a folder: the digests of its files, in the format of `sha256sum -c`

SEEN = ".sha256-seen.json"  # in a folder: what its large files were like when they were hashed
LARGE = 64 << 20  # bytes of the smallest file that is in it
# Seconds in which a second change of a file may leave its time as it is, with much to spare.
CLOCK_TICK = 2.0


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(
    folder: Path, names: Iterable[str] | None = None, digests: Mapping[str, str] | None = None
) -> None:
    """Write the digests that `verified` compares with.

    Args:
        folder: of the files.
        names: files in it that are final; all of them by default.
        digests: of files that were hashed already.
    """
    found = [
        path.name for path in folder.iterdir() if path.is_file() and path.name not in (SUMS, SEEN)
    ]
    known = dict(digests or {})
    lines = []
    for name in sorted(names or found):
        before = _state(folder / name)
        digest = known.get(name) or sha256(folder / name)
        _remember(folder / name, digest, before)
        lines.append(f"{digest}  {name}\n")
    write_atomic(folder / SUMS, "".join(lines).encode())


def verified(path: Path) -> Path:
    """The path itself, once the file has the digest that was sealed.

    A folder without digests (placed by hand, or made before they existed) is accepted as it is.

    Raises:
        ValueError: the file or its recorded digest is corrupt.
    """
    if (path.parent / SUMS).exists():
        digest(path)
    return path


def digest(path: Path) -> str:
    """Hexadecimal digest of a file: the one that was sealed, if there is one.

    Raises:
        ValueError: the file or its recorded digest is corrupt.
    """
    sums = path.parent / SUMS
    if not sums.exists():
        return sha256(path)
    wanted, before = _digests(sums).get(path.name), _state(path)
    if wanted is not None and _seen(path.parent).get(path.name) == [wanted, *before]:
        return wanted
    found = sha256(path)
    if found != wanted:
        raise ValueError(
            f"{path} is broken: its sha256 is {found}, {SUMS} beside it has {wanted}; "
            f"delete {path.parent} and run again"
        )
    _remember(path, found, before)
    return found


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


def _state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _seen(folder: Path) -> dict[str, list[Any]]:
    """Name of a large file -> its digest, size and time when it was hashed."""
    try:
        return json.loads((folder / SEEN).read_bytes())
    except (OSError, ValueError):  # none yet, or torn: the files are hashed
        return {}


def _remember(path: Path, digest: str, before: tuple[int, int]) -> None:
    """Record what a large file was like before it was hashed, unless it was being written."""
    size, changed = before
    if size < LARGE or time.time() - changed / 1e9 < CLOCK_TICK:
        return
    seen = _seen(path.parent) | {path.name: [digest, size, changed]}
    # Several jobs may hash the same file, and a folder may be read-only: then it is hashed again.
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    with suppress(OSError):
        try:
            temporary.write_text(json.dumps(seen))
            os.replace(temporary, path.parent / SEEN)
        finally:
            temporary.unlink(missing_ok=True)
