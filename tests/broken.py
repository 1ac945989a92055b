"""Files as a bad disk, or a crash while they are written, leaves them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flipped(data: bytes, place: int) -> bytes:
    """The same but for one bit."""
    changed = bytearray(data)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


@contextmanager
def replaced(path: Path, data: bytes | None) -> Iterator[None]:
    """Other bytes in a file, or none at all, for a while."""
    kept = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    yield
    path.write_bytes(kept)


def broken_forms(path: Path) -> Iterator[bytes | None]:
    """Contents that a disk may leave of a file: none, half, all but the end, all but one bit."""
    data = path.read_bytes()
    yield from (None, b"", data[: len(data) // 2], data[:-1], flipped(data, len(data) * 2 // 3))
