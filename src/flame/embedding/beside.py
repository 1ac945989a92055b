"""Numbers beside the vectors of a part, such as checksums: one file each.

Each is a Zarr array of a single chunk, which holds the rows in order and then their CRC32C. A
writer fills the file in place, shard by shard, and adds the checksum when all rows are there; a
reader maps it into memory, which all processes of a machine then share.
"""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

CRC_BYTES = 4


def path_of(folder: Path, shape: tuple[int, ...]) -> Path:
    """Path of the only chunk of an array."""
    return folder.joinpath("c", *["0"] * len(shape))


def write(folder: Path, first: int, values: np.ndarray) -> None:
    """Write the values (n, ...) of the rows from number `first` on."""
    path = path_of(folder, values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(first * values[0].nbytes)
        file.write(values.tobytes())


def seal(folder: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Add the checksum, once all rows are written."""
    with path_of(folder, shape).open("r+b") as file:
        whole = file.read(_bytes(shape, dtype))
        file.write(_crc(whole))
        file.truncate()


def read(folder: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array, mapped into memory.

    Raises:
        ValueError: it is not complete, or does not have its checksum.
    """
    if not shape[0]:
        return np.empty(shape, dtype)
    path, size = path_of(folder, shape), _bytes(shape, dtype)
    found = path.stat().st_size
    if found != size + CRC_BYTES:
        raise ValueError(f"{path} has {found} bytes, not {size + CRC_BYTES}")
    file: Any = np.memmap(path, np.uint8, mode="r")
    if file[size:].tobytes() != _crc(file[:size]):
        raise ValueError(f"{path} does not match its checksum")
    return np.asarray(file[:size].view(dtype).reshape(shape))


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _crc(data: bytes | np.ndarray) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")
