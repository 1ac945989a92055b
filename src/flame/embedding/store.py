"""The store of caption embeddings: a plain Zarr v3 group for each part of a caption kind.

In `<part>.zarr` every data set has a group with one array, `<dataset>/embeddings`, and a file
`<dataset>/keys.parquet`, whose row i holds the key of row i of the array. The attributes of
`<part>.zarr` record how the vectors were computed; parts whose attributes differ are not read
together.

Shapes: (N, K, D), N captions, K facets, D values each, float16, in chunks of `CHUNK_ROWS` rows
inside shards of `SHARD_ROWS` rows. In a study that stores 8 bits (`quantization`), the array holds
uint8 (the bits of e4m3) or int8, and `<dataset>/scales`, (N, K, 1) or (1, K, D), the factors to
multiply them by. There is no compressor, because vectors do not compress (1.1 to 1.2 by zstd). The
index of a shard therefore gives the offset of each row, and one `pread` reads it: random rows are
as fast as in a memory map (bench/store.py).
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import polars as pl
import zarr
from zarr.codecs import Crc32cCodec

from flame.embedding.quantization import STORAGES, Name, of_dtype
from flame.runtime.checksums import sha256
from flame.runtime.errors import known
from flame.runtime.parts import agreed
from flame.runtime.resumable import write_atomic

FORMAT = 2  # 1 had no checksums
CHUNK_ROWS = 16
SHARD_ROWS = 512
KEYS = "keys.parquet"
DIGEST = "sha256"  # of the other attributes
# Attributes in which the parts of one kind differ; they must agree in all others.
OWN = ("part", "counts", "made_with")


class Writer:
    """Writes the array of one data set in one part, shard by shard; can resume after any shard."""

    def __init__(
        self,
        path: Path,
        dataset: str,
        *,
        keys: Sequence[str],
        facets: Sequence[str],
        dim: int,
        storage: Name = "float16",
    ) -> None:
        """Create the array, or open the one that an interrupted job left.

        Args:
            path: `<part>.zarr`, as written by `create`.
            dataset: name of the data set.
            keys: key of each of the N rows.
            facets: names of the K facets, for errors.
            dim: D.
            storage: format of the vectors on disk.
        """
        self._keys, self._facets, self._storage = keys, facets, STORAGES[storage]
        self._folder = path / dataset
        self._shard_rows = min(SHARD_ROWS, max(1, -(-len(keys) // CHUNK_ROWS)) * CHUNK_ROWS)
        group = zarr.open_group(self._folder, mode="a", zarr_format=3)
        self._array = self._open_or_create(
            group,
            "embeddings",
            (len(keys), len(facets), dim),
            dtype=self._storage.dtype,
            chunks=(CHUNK_ROWS, len(facets), dim),
            shards=(self._shard_rows, len(facets), dim),
            compressors=None,
            fill_value=float("nan") if self._storage.dtype == "float16" else 0,
        )
        self._checksums = self._open_or_create(
            group,
            "checksums",
            (len(keys), len(facets)),
            dtype="uint32",
            chunks=(self._shard_rows, len(facets)),
            compressors=Crc32cCodec(),
        )
        if self._storage.scales:
            self._scales = self._open_or_create_scales(group, dim)
        write_atomic(self._folder / KEYS, pl.DataFrame({"key": keys}).write_parquet)
        group.attrs.put({KEYS: sha256(self._folder / KEYS)})

    def _open_or_create(
        self, group: zarr.Group, name: str, shape: tuple[int, ...], **options: Any
    ) -> zarr.Array[Any]:
        if name in group:
            return zarr.open_array(self._folder / name, mode="r+")
        return group.create_array(name, shape=shape, **options)

    def _open_or_create_scales(self, group: zarr.Group, dim: int) -> zarr.Array[Any]:
        rows, facets, each = len(self._keys), len(self._facets), self._storage.is_of_row
        return self._open_or_create(
            group,
            "scales",
            (rows, facets, 1) if each else (1, facets, dim),
            dtype="float16" if each else "float32",
            chunks=(self._shard_rows, facets, 1) if each else (1, facets, dim),
            compressors=Crc32cCodec(),
            fill_value=float("nan"),
        )

    def missing(self) -> list[range]:
        """Rows of every shard that is not written yet."""
        # Shard files appear by rename, so an existing one is complete.
        rows, step = len(self._keys), self._shard_rows
        shards = [range(start, min(start + step, rows)) for start in range(0, rows, step)]
        return [s for s in shards if not _shard(self._folder, s.start // step).exists()]

    def write(self, rows: range, vectors: np.ndarray) -> None:
        """Write one shard.

        Args:
            rows: one of `missing`; write them in order.
            vectors: (len(rows), K, D) of any float type.

        Raises:
            ValueError: a value is out of the range of float16.
        """
        with np.errstate(over="ignore"):
            half = vectors.astype(np.float16)
        bad = np.argwhere(~np.isfinite(half))
        if len(bad):
            row, facet, place = bad[0]
            raise ValueError(
                f"embedding of key {self._keys[rows.start + row]!r}, facet {self._facets[facet]!r} "
                f"holds {vectors[row, facet, place]}, which float16 cannot represent"
            )
        # The shard is written last, so that an existing one has its scales and checksums.
        stored = np.ascontiguousarray(self._encoded(rows, half))
        self._checksums[rows.start : rows.stop] = _checksums(stored)
        self._array[rows.start : rows.stop] = stored

    def _encoded(self, rows: range, vectors: np.ndarray) -> np.ndarray:
        """Stored values of a shard; writes its scales."""
        if self._storage.scales is None:
            return vectors
        place = slice(rows.start, rows.stop) if self._storage.is_of_row else slice(0, 1)
        if self._storage.is_of_row or rows.start == 0:
            self._scales[place] = self._storage.scales(vectors)
        return self._storage.encode(vectors, np.asarray(self._scales[place]))


def create(path: Path, attributes: Mapping[str, Any]) -> None:
    """Create the group of one part, or open the one that an interrupted job left.

    Args:
        path: `<part>.zarr`.
        attributes: how the vectors are computed: at least `kind`, `facets` (name -> suffix), `part`
            and `parts`.
    """
    for torn in path.rglob("*.partial"):  # temporary files of Zarr, if it was killed
        torn.unlink()
    described = {"format": FORMAT, **attributes}
    group = zarr.open_group(path, mode="a", zarr_format=3)
    group.attrs.put(described | {DIGEST: _digest(described)})


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a part, as given to `create`.

    Raises:
        ValueError: it is not a store, incomplete, or of another format.
    """
    with _naming(path):
        found = zarr.open_group(path, mode="r").attrs.asdict()
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: store format {found.get('format')!r} is unknown; known: {FORMAT}"
        )
    with _naming(path):
        if found.pop(DIGEST, None) != _digest(found):
            raise ValueError("its attributes do not match their checksum")
    return found


def _digest(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()  # including the order


def by_kind(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Stores grouped by caption kind."""
    groups = defaultdict(list)
    for path in paths:
        groups[str(read_attributes(path)["kind"])].append(path)
    return dict(groups)


class Embeddings:
    """All embeddings of one data set's captions of one kind.

    Attributes:
        keys: key of each of the N rows; keys may repeat.
        facets: names of the K facets.
        dim: D.
        kind: caption kind.
        attributes: of the first part.
    """

    def __init__(self, parts: Sequence["_Part"], attributes: Mapping[str, Any]) -> None:
        """Join parts in order; `open` checks that their attributes agree."""
        self._parts = parts
        self._starts = np.cumsum([0] + [part.num_rows for part in parts])
        self._cache: np.ndarray | None = None
        self.attributes = attributes
        self.keys = [key for part in parts for key in part.keys]
        self.facets = tuple(attributes["facets"])
        self.kind: str = attributes["kind"]
        self.dim = parts[0].dim

    @classmethod
    def open(cls, paths: Sequence[Path], dataset: str, *, cache_bytes: int = 0) -> "Embeddings":
        """Open the parts of a store for one data set.

        Args:
            paths: all `<part>.zarr` of one caption kind, in any order.
            dataset: name of the data set.
            cache_bytes: all rows are read once and kept in memory if they fit.

        Raises:
            ValueError: a part is missing, duplicate or has other attributes, or does not hold the
                data set.
        """
        if not paths:
            raise ValueError(f"no part of a store given for data set {dataset!r}")
        attributes = agreed({path: read_attributes(path) for path in paths}, OWN)
        parts = [_Part(path, dataset) for path in attributes]
        embeddings = cls(parts, next(iter(attributes.values())))
        if sum(part.num_bytes for part in parts) <= cache_bytes:
            embeddings._cache = embeddings.rows(np.arange(len(embeddings.keys)))
        return embeddings

    def rows(self, indices: np.ndarray, facets: Sequence[str] | None = None) -> np.ndarray:
        """Rows by number, in any order, with repeats.

        Args:
            indices: (n,) integers in [0, N).
            facets: names of the facets to read; all by default.

        Returns:
            (n, K', D) float16, facets in the requested order.
        """
        columns = self._columns(facets)
        if self._cache is not None:
            return self._cache[indices[:, None], columns]
        first, last = columns.min(), columns.max() + 1
        out = np.empty((len(indices), last - first, self.dim), dtype="<f2")
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(owner):
            where = np.flatnonzero(owner == number)
            self._parts[number].read(indices[where] - self._starts[number], first, out, where)
        whole = np.array_equal(columns, np.arange(first, last))
        return out if whole else out[:, columns - first]

    def mean(self, facets: Sequence[str] | None = None) -> np.ndarray:
        """Mean vector of each facet over all rows, (K', D) float32, accumulated in float64."""
        columns = self._columns(facets)
        names = [self.facets[column] for column in columns]
        total = np.zeros((len(names), self.dim))
        for start in range(0, len(self.keys), SHARD_ROWS):
            rows = np.arange(start, min(start + SHARD_ROWS, len(self.keys)))
            total += self.rows(rows, names).sum(axis=0, dtype=np.float64)
        return (total / len(self.keys)).astype(np.float32)

    def _columns(self, facets: Sequence[str] | None) -> np.ndarray:
        for facet in facets or ():
            if facet not in self.facets:
                raise ValueError(f"unknown facet {known(facet, self.facets)}")
        return np.array([self.facets.index(facet) for facet in facets or self.facets])


class _Part:
    """Rows of one data set in one part. Reads the shard files directly, without Zarr."""

    def __init__(self, path: Path, dataset: str) -> None:
        known_datasets = sorted(keys.parent.name for keys in path.glob("*/keys.parquet"))
        if dataset not in known_datasets:
            raise ValueError(f"{path} has no data set {known(dataset, known_datasets)}")
        self._folder = path / dataset
        with _naming(path):
            array = zarr.open_array(self._folder / "embeddings", mode="r")
            self.num_rows, self.num_facets, self.dim = array.shape
            storage = of_dtype(array.dtype)
            self._scales = self._whole("scales") if storage and storage.scales else None
            self._checksums = self._whole("checksums")
            self.keys = self._read_keys()
        is_whole = array.chunks[1:] == (self.num_facets, self.dim) and not array.compressors
        if storage is None or not is_whole:
            raise ValueError(
                f"{path}/{dataset}: rows are split among chunks, or of an unknown type: "
                f"chunks {array.chunks}, {array.dtype}, compressors {array.compressors}"
            )
        self._storage, self._dtype = storage, array.dtype
        if array.shards is None:
            raise ValueError(f"{path}/{dataset}: the array has no shards")
        self._shard_rows, self._chunk_rows = array.shards[0], array.chunks[0]
        self._chunk_starts: dict[int, np.ndarray] = {}
        self.num_bytes = array.size * 2  # as float16, as returned by `rows`
        if len(self.keys) != self.num_rows:
            raise ValueError(f"{path}/{dataset}: {len(self.keys)} keys for {self.num_rows} rows")

    def _whole(self, name: str) -> np.ndarray:
        """An array with all its chunks; Zarr would silently fill in missing ones."""
        array = zarr.open_array(self._folder / name, mode="r")
        if self.num_rows and array.nchunks_initialized != array.nchunks:
            raise ValueError(f"{name} has {array.nchunks_initialized} of {array.nchunks} chunks")
        return np.asarray(array[:])

    def _read_keys(self) -> list[str]:
        found = sha256(self._folder / KEYS)
        wanted = zarr.open_group(self._folder, mode="r").attrs[KEYS]
        if found != wanted:
            raise ValueError(f"{KEYS} has sha256 {found}, not {wanted} as written")
        return pl.read_parquet(self._folder / KEYS)["key"].to_list()

    def read(self, rows: np.ndarray, first: int, out: np.ndarray, where: np.ndarray) -> None:
        """Read `rows` into `out[where]`, (n, K', D), from facet number `first` on."""
        if self._scales is None:
            self._read(rows, first, out, where)
            return
        values = np.empty((len(rows), *out.shape[1:]), self._dtype)
        self._read(rows, first, values, np.arange(len(rows)))
        scales = self._scales[rows] if self._storage.is_of_row else self._scales
        out[where] = self._storage.decode(values) * scales[:, first : first + out.shape[1]]

    def _read(self, rows: np.ndarray, first: int, out: np.ndarray, where: np.ndarray) -> None:
        """The same for stored values, without scales; verifies checksums."""
        facet_bytes = self.dim * out.itemsize
        row_bytes = self.num_facets * facet_bytes
        shards = rows // self._shard_rows
        found = np.empty((len(rows), out.shape[1]), np.uint32)
        for shard in np.unique(shards):
            with _shard(self._folder, shard).open("rb", buffering=0) as file:
                starts = self._starts(shard, file)
                for i in np.flatnonzero(shards == shard):
                    row, into = rows[i], out[where[i]]
                    chunk, inside = divmod(row % self._shard_rows, self._chunk_rows)
                    start = starts[chunk] + inside * row_bytes + first * facet_bytes
                    if os.preadv(file.fileno(), [into], start) != into.nbytes:
                        raise ValueError(f"{file.name} ends before row {row}")
                    found[i] = [
                        *map(google_crc32c.value, into)
                    ]  # while the vector is in the CPU cache
        wrong = np.argwhere(found != self._checksums[rows, first : first + out.shape[1]])
        if len(wrong):
            row, facet = rows[wrong[0][0]], first + wrong[0][1]
            raise ValueError(
                f"{_shard(self._folder, row // self._shard_rows)} is corrupt: facet number {facet} "
                f"of key {self.keys[row]!r} does not match its checksum; delete the store and run "
                "again"
            )

    def _starts(self, shard: int, file: IO[bytes]) -> np.ndarray:
        """Offset of each chunk in a shard file, from the index at the end of the file."""
        if shard not in self._chunk_starts:
            # (offset, size) of each chunk, 8 bytes each, then 4 bytes of CRC32C
            size = 16 * (self._shard_rows // self._chunk_rows)
            end = os.fstat(file.fileno()).st_size
            index = os.pread(file.fileno(), size + 4, max(0, end - size - 4))
            if google_crc32c.value(index[:size]).to_bytes(4, "little") != index[size:]:
                raise ValueError(
                    f"{file.name} is corrupt: its index does not match its checksum; delete the "
                    "store and run again"
                )
            pairs = np.frombuffer(index[:size], "<i8").reshape(-1, 2)
            self._chunk_starts[shard] = pairs[:, 0]
        return self._chunk_starts[shard]


def _shard(folder: Path, number: int) -> Path:
    return folder / "embeddings" / "c" / str(number) / "0" / "0"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path of the store to what Zarr raises on truncated or corrupt files."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is corrupt or incomplete: {error}; delete it and run again"
        ) from error


def _checksums(vectors: np.ndarray) -> np.ndarray:
    """CRC32C of every vector, (n, K) uint32, of contiguous (n, K, D)."""
    flat = vectors.reshape(-1, vectors.shape[2])
    found = np.fromiter(map(google_crc32c.value, flat), np.uint32, len(flat))
    return found.reshape(vectors.shape[:2])
