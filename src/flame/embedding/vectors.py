"""Vectors of a store, read from its shard files in any process. Needs neither Zarr nor polars.

Shapes: N rows of a part, n of them, K facets, K' of them, D values each.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import google_crc32c
import numpy as np

from flame.embedding import beside
from flame.embedding.quantization import Storage, of_dtype

KEYS = "keys.parquet"
CHECKSUMS, SCALES = "checksums", "scales"
CHECKSUM_TYPE = "<u4"


# Indices of shards that this process has read: (`Part.opened`, shard) -> offset of each chunk.
_STARTS: dict[tuple[int, int], np.ndarray] = {}
_SAME: dict[bytes, np.ndarray] = {}


class Part(NamedTuple):
    """Where and how the rows of a data set in one part are stored."""

    folder: str
    shape: tuple[int, int, int]  # (N, K, D)
    dtype: str
    shard_rows: int
    chunk_rows: int
    opened: int  # number of the time it was opened: what is cached of it lasts no longer

    @property
    def storage(self) -> Storage:
        """Format of the vectors."""
        found = of_dtype(np.dtype(self.dtype))
        assert found is not None
        return found


class Rows(NamedTuple):
    """Rows of a part, and their places in an array that holds those of several parts."""

    part: Part
    rows: np.ndarray  # (n,)
    places: np.ndarray  # (n,)


@dataclass(frozen=True)
class Vectors:
    """Call that reads rows of several parts.

    Attributes:
        parts: the rows of each part.
        shape: (n, K', D) of all rows.
        columns: (K',) numbers of the facets.
    """

    parts: tuple[Rows, ...]
    shape: tuple[int, int, int]
    columns: np.ndarray

    def __call__(self) -> np.ndarray:
        """(n, K', D) float16, facets in the order of `columns`."""
        first, last = self.columns.min(), self.columns.max() + 1
        count, _, dim = self.shape
        out = np.empty((count, last - first, dim), "<f2")
        for part, rows, places in self.parts:
            _read(part, rows, first, out, places)
        whole = np.array_equal(self.columns, np.arange(first, last))
        return out if whole else out[:, self.columns - first]


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Adds the path of the store to what is raised on truncated or corrupt files."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is corrupt or incomplete: {error}; delete it and run again"
        ) from error


def shard_path(folder: Path | str, number: int) -> Path:
    """Path of a shard by number."""
    return Path(folder, "embeddings", "c", str(number), "0", "0")


def scales_shape(storage: Storage, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape of the scales of vectors (N, K, D): of each row, or of all rows."""
    rows, facets, dim = shape
    return (rows, facets, 1) if storage.is_of_row else (min(1, rows), facets, dim)


def _read(part: Part, rows: np.ndarray, first: int, out: np.ndarray, where: np.ndarray) -> None:
    """Read rows into `out[where]`, (n, K', D), from facet number `first` on."""
    storage = part.storage
    if storage.scales is None:
        _read_stored(part, rows, first, out, where)
        return
    values = np.empty((len(rows), *out.shape[1:]), part.dtype)
    _read_stored(part, rows, first, values, np.arange(len(rows)))
    scales = _scales(part)[rows] if storage.is_of_row else _scales(part)
    out[where] = storage.decode(values) * scales[:, first : first + out.shape[1]]


def _read_stored(
    part: Part, rows: np.ndarray, first: int, out: np.ndarray, where: np.ndarray
) -> None:
    """The same for stored values, without scales; verifies checksums."""
    _, num_facets, dim = part.shape
    facet_bytes = dim * out.itemsize
    row_bytes = num_facets * facet_bytes
    shards = rows // part.shard_rows
    found = np.empty((len(rows), out.shape[1]), np.uint32)
    for shard in np.unique(shards):
        with shard_path(part.folder, shard).open("rb", buffering=0) as file:
            starts = _starts(part, int(shard), file)
            for i in np.flatnonzero(shards == shard):
                row, into = int(rows[i]), out[where[i]]
                chunk, inside = divmod(row % part.shard_rows, part.chunk_rows)
                start = int(starts[chunk]) + inside * row_bytes + int(first) * facet_bytes
                if os.preadv(file.fileno(), [into], start) != into.nbytes:
                    raise ValueError(f"{file.name} ends before row {row}")
                # while the vector is in the CPU cache
                found[i] = [*map(google_crc32c.value, into)]
    wrong = np.argwhere(found != _checksums(part)[rows, first : first + out.shape[1]])
    if len(wrong):
        row, facet = int(rows[wrong[0][0]]), first + wrong[0][1]
        raise ValueError(
            f"{shard_path(part.folder, row // part.shard_rows)} is corrupt: facet number {facet} "
            f"of key {_key(part, row)!r} does not match its checksum; delete the store and run "
            "again"
        )


def _starts(part: Part, shard: int, file: IO[bytes]) -> np.ndarray:
    """Offset of each chunk in a shard file, from the index at the end of the file."""
    known = _STARTS.get((part.opened, shard))
    if known is not None:
        return known
    # (offset, size) of each chunk, 8 bytes each, then 4 bytes of CRC32C
    size = 16 * (part.shard_rows // part.chunk_rows)
    end = os.fstat(file.fileno()).st_size
    index = os.pread(file.fileno(), size + 4, max(0, end - size - 4))
    if google_crc32c.value(index[:size]).to_bytes(4, "little") != index[size:]:
        raise ValueError(
            f"{file.name} is corrupt: its index does not match its checksum; delete the "
            "store and run again"
        )
    # Most shards have the same index, which is then kept once.
    starts = _SAME.setdefault(index, np.frombuffer(index[:size], "<i8").reshape(-1, 2)[:, 0])
    _STARTS[part.opened, shard] = starts
    return starts


@cache
def _checksums(part: Part) -> np.ndarray:
    """CRC32C of each vector, (N, K), mapped into memory."""
    with naming(part.folder):
        return beside.read(Path(part.folder, CHECKSUMS), part.shape[:2], CHECKSUM_TYPE)


@cache
def _scales(part: Part) -> np.ndarray:
    """Factors of the stored values, (N, K, 1) or (1, K, D), mapped into memory."""
    storage = part.storage
    with naming(part.folder):
        shape = scales_shape(storage, part.shape)
        return beside.read(Path(part.folder, SCALES), shape, storage.scales_dtype)


def _key(part: Part, row: int) -> str:
    """Key of a row, for errors."""
    import polars as pl  # only here, as the workers of a loader never need it otherwise

    keys = pl.scan_parquet(Path(part.folder, KEYS))
    return str(keys.slice(row, 1).select("key").collect().item())
