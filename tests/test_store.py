"""The store gives back the rows that were written, and refuses to mix what does not belong."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr

from flame import store

FACETS = ("category", "scene", "mood")
DIM = 8
ATTRIBUTES = {
    "kind": "long",
    "llm": "tiny",
    "prefix": ["a", "b"],
    "facets": {name: f" {name}" for name in FACETS},
    "parts": 1,
    "part": 0,
}


def write(path: Path, vectors: np.ndarray, first_key: int = 0, **attributes: object) -> Path:
    store.create(path, ATTRIBUTES | attributes)
    keys = [f"key-{first_key + i}" for i in range(len(vectors))]
    writer = store.Writer(path, "scenes", keys=keys, facets=FACETS, dim=DIM)
    for rows in writer.missing():
        writer.write(rows, vectors[rows.start : rows.stop])
    return path


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1300, len(FACETS), DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def parts(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("store")
    return [
        write(folder / "0.zarr", vectors[:601], parts=2, part=0),
        write(folder / "1.zarr", vectors[601:], first_key=601, parts=2, part=1),
    ]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("facets", [None, ["scene"], ["mood", "category"], list(FACETS)])
def test_rows_equal_numpy_indexing(parts, vectors, facets, cache_bytes):
    embeddings = store.Embeddings.open(parts[::-1], "scenes", cache_bytes=cache_bytes)
    columns = [FACETS.index(name) for name in facets or FACETS]
    indices = np.random.default_rng(1).integers(len(vectors), size=500)  # with duplicates
    expected = vectors.astype(np.float16)[indices][:, columns]
    np.testing.assert_array_equal(embeddings.rows(indices, facets), expected)
    assert embeddings.keys == [f"key-{i}" for i in range(len(vectors))]


def test_zarr_reads_the_same(parts, vectors):
    array = zarr.open_array(parts[0] / "scenes" / "embeddings", mode="r")
    np.testing.assert_array_equal(array[:], vectors[:601].astype(np.float16))


def test_mean_is_that_of_all_rows(parts, vectors):
    embeddings = store.Embeddings.open(parts, "scenes")
    expected = vectors.astype(np.float16).astype(np.float64).mean(axis=0)[[2, 0]]
    np.testing.assert_allclose(embeddings.mean(["mood", "category"]), expected, atol=1e-7)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 512, 513])
def test_any_number_of_rows(tmp_path, vectors, rows):
    path = write(tmp_path / "0.zarr", vectors[:rows])
    read = store.Embeddings.open([path], "scenes").rows(np.arange(rows))
    np.testing.assert_array_equal(read, vectors[:rows].astype(np.float16))


def test_a_writer_goes_on_at_the_shards_that_are_missing(tmp_path, vectors):
    path = write(tmp_path / "0.zarr", vectors)
    (path / "scenes/embeddings/c/1/0/0").unlink()
    torn = path / "scenes/embeddings/c/1/0/0.abc.partial"
    torn.write_bytes(b"half a shard")
    keys = pl.read_parquet(path / "scenes/keys.parquet")["key"].to_list()
    store.create(path, ATTRIBUTES)
    writer = store.Writer(path, "scenes", keys=keys, facets=FACETS, dim=DIM)
    assert writer.missing() == [range(512, 1024)]
    assert not torn.exists()


@pytest.mark.parametrize("value", [70000.0, np.nan, -np.inf])
def test_what_float16_cannot_hold_is_refused(tmp_path, vectors, value):
    bad = vectors.copy()
    bad[700, 1, 3] = value
    with pytest.raises(ValueError, match=f"'key-700', facet 'scene' holds {value}"):
        write(tmp_path / "0.zarr", bad)


def test_missing_and_double_parts_are_refused(parts):
    with pytest.raises(ValueError, match=r"parts \[1\] of a store that was cut into 2"):
        store.Embeddings.open(parts[1:], "scenes")
    copy = parts[0].with_name("copy.zarr")
    shutil.copytree(parts[0], copy)
    with pytest.raises(ValueError, match=r"parts \[0, 0, 1\]"):
        store.Embeddings.open([*parts, copy], "scenes")


@pytest.mark.parametrize(
    ("name", "value"),
    [("llm", "other"), ("prefix", ["a", "c"]), ("facets", dict.fromkeys(reversed(FACETS), " x"))],
)
def test_parts_that_differ_are_refused(parts, vectors, tmp_path, name, value):
    other = write(tmp_path / "1.zarr", vectors[601:], **{"parts": 2, "part": 1, name: value})
    with pytest.raises(ValueError, match=f"differ in {name}"):
        store.Embeddings.open([parts[0], other], "scenes")


def test_unknown_names_are_told_with_the_known_ones(parts):
    with pytest.raises(ValueError, match=r"no data set 'scene'.*known: scenes"):
        store.Embeddings.open(parts, "scene")
    with pytest.raises(ValueError, match=r"unknown facet 'moods'.*category, scene, mood"):
        store.Embeddings.open(parts, "scenes").rows(np.arange(2), ["moods"])


def test_unknown_format_is_refused(tmp_path, vectors):
    path = write(tmp_path / "0.zarr", vectors[:3])
    group = json.loads((path / "zarr.json").read_text())
    group["attributes"]["format"] = 99
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ValueError, match="format 99 is unknown; known: 1"):
        store.Embeddings.open([path], "scenes")
