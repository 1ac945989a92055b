"""The store of caption embeddings: a plain Zarr v3 group for each part of a caption kind.

In `<part>.zarr` every data set has a group with one array, `<dataset>/embeddings`, and a file
`<dataset>/keys.parquet`, whose row i holds the key of row i of the array. The attributes of
`<part>.zarr` record how the vectors were computed; parts whose attributes differ are not read
together.

Shapes: (N, K, D), N captions, K facets, D values each, float16, in chunks of `CHUNK_ROWS` rows
inside shards of `SHARD_ROWS` rows. In a study that stores 8 bits (`quantization`), the array holds
uint8 (the bits of e4m3) or int8, and `<dataset>/scales`, (N, K, 1) or (1, K, D), the factors to
multiply them by. Scales and `<dataset>/checksums`, the CRC32C of every vector, are one file each
(`beside`), so a part has one file for each shard and a constant number of others. There is no
compressor, because vectors do not compress (1.1 to 1.2 by zstd). The index of a shard therefore
gives the offset of each row, and one `pread` reads it (`vectors`): random rows are as fast as in a
memory map (bench/store.py).
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import polars as pl
import zarr
from zarr.codecs import Crc32cCodec

from flame.embedding import beside
from flame.embedding.quantization import STORAGES, Name, of_dtype
from flame.embedding.vectors import (
    CHECKSUM_TYPE,
    CHECKSUMS,
    KEYS,
    SCALES,
    Part,
    Rows,
    Vectors,
    naming,
    scales_shape,
    shard_path,
)
from flame.runtime.checksums import sha256
from flame.runtime.errors import known
from flame.runtime.parts import agreed
from flame.runtime.requests import HereOrThere, Request
from flame.runtime.resumable import write_atomic

FORMAT = 3  # 1 had no checksums, 2 a file of checksums for each shard
CHUNK_ROWS = 16
SHARD_ROWS = 512
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
        keys: Sequence[str] | pl.Series,
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
        self._create_beside(group, CHECKSUMS, self._array.shape[:2], CHECKSUM_TYPE)
        self._scales_shape = scales_shape(self._storage, (len(keys), len(facets), dim))
        if self._storage.scales:
            self._create_beside(group, SCALES, self._scales_shape, self._storage.scales_dtype)
        table = pl.DataFrame({"key": keys}, schema={"key": pl.String})
        write_atomic(self._folder / KEYS, table.write_parquet)
        group.attrs.put({KEYS: sha256(self._folder / KEYS)})
        self._left = set(self.missing())

    def _open_or_create(
        self, group: zarr.Group, name: str, shape: tuple[int, ...], **options: Any
    ) -> zarr.Array[Any]:
        if name in group:
            return zarr.open_array(self._folder / name, mode="r+")
        return group.create_array(name, shape=shape, **options)

    def _create_beside(
        self, group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str
    ) -> None:
        self._open_or_create(
            group,
            name,
            shape,
            dtype=dtype,
            chunks=(max(1, shape[0]), *shape[1:]),
            compressors=Crc32cCodec(),
        )

    def missing(self) -> list[range]:
        """Rows of every shard that is not written yet."""
        # Shard files appear by rename, so an existing one is complete.
        rows, step = len(self._keys), self._shard_rows
        shards = [range(start, min(start + step, rows)) for start in range(0, rows, step)]
        return [s for s in shards if not shard_path(self._folder, s.start // step).exists()]

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
        beside.write(self._folder / CHECKSUMS, rows.start, _checksums(stored))
        self._left.discard(rows)
        if not self._left:
            self._seal()
        self._array[rows.start : rows.stop] = stored

    def _encoded(self, rows: range, vectors: np.ndarray) -> np.ndarray:
        """Stored values of a shard; writes its scales."""
        make, folder = self._storage.scales, self._folder / SCALES
        if make is None:
            return vectors
        if self._storage.is_of_row:
            scales = make(vectors)
            beside.write(folder, rows.start, scales)
        else:
            shape, dtype = self._scales_shape, self._storage.scales_dtype
            if rows.start == 0:
                beside.write(folder, 0, make(vectors).astype(dtype))
                beside.seal(folder, shape, dtype)
            scales = beside.read(folder, shape, dtype)
        return self._storage.encode(vectors, scales)

    def _seal(self) -> None:
        beside.seal(self._folder / CHECKSUMS, self._array.shape[:2], CHECKSUM_TYPE)
        if self._storage.is_of_row:
            beside.seal(self._folder / SCALES, self._scales_shape, self._storage.scales_dtype)


def create(path: Path, attributes: Mapping[str, Any]) -> None:
    """Create the group of one part, or open the one that an interrupted job left.

    Args:
        path: `<part>.zarr`.
        attributes: how the vectors are computed: at least `kind`, `facets` (name -> suffix), `part`
            and `parts`.
    """
    for torn in path.rglob("*.partial"):  # temporary files of Zarr, if it was killed
        torn.unlink()
    if (path / "zarr.json").exists() and _attributes(path).get("format") != FORMAT:
        shutil.rmtree(path)  # begun by an older version
        path.mkdir()
    described = {"format": FORMAT, **attributes}
    group = zarr.open_group(path, mode="a", zarr_format=3)
    group.attrs.put(described | {DIGEST: _digest(described)})


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a part, as given to `create`.

    Raises:
        ValueError: it is not a store, incomplete, or of another format.
    """
    found = _attributes(path)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} has store format {found.get('format')!r}, this version reads {FORMAT}; "
            "delete it and run again"
        )
    with naming(path):
        if found.pop(DIGEST, None) != _digest(found):
            raise ValueError("its attributes do not match their checksum")
    return found


def _attributes(path: Path) -> dict[str, Any]:
    with naming(path):
        return zarr.open_group(path, mode="r", zarr_format=3).attrs.asdict()


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

    def __init__(self, opened: Sequence["_Opened"], attributes: Mapping[str, Any]) -> None:
        """Join parts in order; `open` checks that their attributes agree."""
        self._parts = [each.part for each in opened]
        self._starts = np.cumsum([0] + [part.shape[0] for part in self._parts])
        self._cache: np.ndarray | None = None
        self.attributes = attributes
        self.keys = pl.concat([each.keys for each in opened])
        self.facets = tuple(attributes["facets"])
        self.kind: str = attributes["kind"]
        self.dim = self._parts[0].shape[2]

    def __len__(self) -> int:
        return int(self._starts[-1])

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
        opened = [_open(path, dataset) for path in attributes]
        embeddings = cls(opened, next(iter(attributes.values())))
        as_read = 2 * len(embeddings) * len(embeddings.facets) * embeddings.dim  # float16
        if as_read <= cache_bytes:
            embeddings._cache = embeddings.rows(np.arange(len(embeddings)))
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
        return self._stored(indices, columns)()

    def request(self, indices: np.ndarray, facets: Sequence[str] | None = None) -> Request:
        """A call that returns what `rows` does; another process reads the files itself."""
        columns = self._columns(facets)
        if self._cache is None:
            return self._stored(indices, columns)
        return HereOrThere(
            partial(self.rows, indices, facets), partial(self._stored, indices, columns)
        )

    def mean(self, facets: Sequence[str] | None = None) -> np.ndarray:
        """Mean vector of each facet over all rows, (K', D) float32, accumulated in float64."""
        columns = self._columns(facets)
        names = [self.facets[column] for column in columns]
        total = np.zeros((len(names), self.dim))
        for start in range(0, len(self), SHARD_ROWS):
            rows = np.arange(start, min(start + SHARD_ROWS, len(self)))
            total += self.rows(rows, names).sum(axis=0, dtype=np.float64)
        return (total / len(self)).astype(np.float32)

    def _stored(self, indices: np.ndarray, columns: np.ndarray) -> Vectors:
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices.astype(np.int64) - self._starts[owner]
        parts = [(number, np.flatnonzero(owner == number)) for number in np.unique(owner)]
        found = [Rows(self._parts[number], rows[where], where) for number, where in parts]
        return Vectors(tuple(found), (len(indices), len(columns), self.dim), columns)

    def _columns(self, facets: Sequence[str] | None) -> np.ndarray:
        for facet in facets or ():
            if facet not in self.facets:
                raise ValueError(f"unknown facet {known(facet, self.facets)}")
        return np.array([self.facets.index(facet) for facet in facets or self.facets])


class _Opened(NamedTuple):
    part: Part
    keys: pl.Series


_opened = count()


def _open(path: Path, dataset: str) -> _Opened:
    """The rows of one data set in one part, and their keys. Opens the same few files for any N."""
    known_datasets = sorted(keys.parent.name for keys in path.glob(f"*/{KEYS}"))
    if dataset not in known_datasets:
        raise ValueError(f"{path} has no data set {known(dataset, known_datasets)}")
    folder = path / dataset
    with naming(path):
        array = zarr.open_array(folder / "embeddings", mode="r", zarr_format=3)
        keys = _read_keys(folder)
        storage = of_dtype(array.dtype)
        for name in (CHECKSUMS, SCALES) if storage and storage.scales else (CHECKSUMS,):
            zarr.open_array(folder / name, mode="r", zarr_format=3)
    if len(keys) != array.shape[0]:
        raise ValueError(f"{path}/{dataset}: {len(keys)} keys for {array.shape[0]} rows")
    is_whole = array.chunks[1:] == array.shape[1:] and not array.compressors
    if storage is None or not is_whole:
        raise ValueError(
            f"{path}/{dataset}: rows are split among chunks, or of an unknown type: "
            f"chunks {array.chunks}, {array.dtype}, compressors {array.compressors}"
        )
    if array.shards is None:
        raise ValueError(f"{path}/{dataset}: the array has no shards")
    rows, facets, dim = array.shape
    part = Part(
        folder=str(folder),
        shape=(rows, facets, dim),
        dtype=array.dtype.str,
        shard_rows=array.shards[0],
        chunk_rows=array.chunks[0],
        opened=next(_opened),
    )
    return _Opened(part, keys)


def _read_keys(folder: Path) -> pl.Series:
    found = sha256(folder / KEYS)
    wanted = zarr.open_group(folder, mode="r", zarr_format=3).attrs[KEYS]
    if found != wanted:
        raise ValueError(f"{KEYS} has sha256 {found}, not {wanted} as written")
    return pl.read_parquet(folder / KEYS)["key"]


def _checksums(vectors: np.ndarray) -> np.ndarray:
    """CRC32C of every vector, (n, K) uint32, of contiguous (n, K, D)."""
    flat = vectors.reshape(-1, vectors.shape[2])
    found = np.fromiter(map(google_crc32c.value, flat), CHECKSUM_TYPE, len(flat))
    return found.reshape(vectors.shape[:2])
