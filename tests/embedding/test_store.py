"""The store returns the rows that were written, and refuses parts that do not match."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import polars as pl
import pytest
import torch
import zarr

from flame.embedding import store
from flame.embedding.quantization import Name

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


def write(
    path: Path,
    vectors: np.ndarray,
    first_key: int = 0,
    storage: Name = "float16",
    **attributes: object,
) -> Path:
    store.create(path, ATTRIBUTES | attributes)
    keys = [f"key-{first_key + i}" for i in range(len(vectors))]
    writer = store.Writer(
        path, "scenes", keys=keys, facets=FACETS, dim=vectors.shape[2], storage=storage
    )
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
    assert embeddings.keys.to_list() == [f"key-{i}" for i in range(len(vectors))]


def test_zarr_reads_the_same(parts, vectors):
    array = zarr.open_array(parts[0] / "scenes" / "embeddings", mode="r")
    np.testing.assert_array_equal(array[:], vectors[:601].astype(np.float16))


def test_mean_is_that_of_all_rows(parts, vectors):
    embeddings = store.Embeddings.open(parts, "scenes")
    expected = vectors.astype(np.float16).astype(np.float64).mean(axis=0)[[2, 0]]
    np.testing.assert_allclose(embeddings.mean(["mood", "category"]), expected, atol=1e-7)


@pytest.mark.parametrize("storage", ["float16", "fp8", "int8"])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 512, 513])
def test_any_number_of_rows(tmp_path, vectors, rows, storage):
    path = write(tmp_path / "0.zarr", vectors[:rows], storage=storage)
    read = store.Embeddings.open([path], "scenes").rows(np.arange(rows))
    atol = 0 if storage == "float16" else 0.13
    np.testing.assert_allclose(read, vectors[:rows].astype(np.float16), atol=atol)


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
    with pytest.raises(ValueError, match="no part of a store given for data set 'scenes'"):
        store.Embeddings.open([], "scenes")
    with pytest.raises(ValueError, match=r"found parts \[1\], expected all of 2 parts"):
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
    with pytest.raises(ValueError, match="has store format 99, this version reads 3"):
        store.Embeddings.open([path], "scenes")


def vectors_of_an_llm(rows: int = 600, dim: int = 64) -> np.ndarray:
    """Vectors of very different norms; as in hidden states, a few dimensions are far larger."""
    rng = np.random.default_rng(1)
    found = rng.standard_normal((rows, len(FACETS), dim)) * np.exp(rng.normal(0, 1, (rows, 1, 1)))
    return found * np.where(np.arange(dim) % 16 == 3, 50, 1)


def test_fp8_is_that_of_torch_and_its_scale_a_power_of_two(tmp_path):
    vectors = vectors_of_an_llm().astype(np.float16)
    path = write(tmp_path / "0.zarr", vectors, storage="fp8")
    read = torch.from_numpy(store.Embeddings.open([path], "scenes").rows(np.arange(600)))
    scales = zarr.open_array(path / "scenes/scales", mode="r")[:].astype(np.float64)
    assert (np.frexp(scales)[0] == 0.5).all()
    expected = torch.from_numpy(vectors / scales).to(torch.float8_e4m3fn).double() * scales
    torch.testing.assert_close(read.double(), expected, rtol=0, atol=1e-7)
    cosine = torch.cosine_similarity(read.float(), torch.from_numpy(vectors).float(), dim=2)
    assert 1e-5 < (1 - cosine).max() < 2e-3


def test_int8_rounds_to_a_step_of_its_dimension_and_clips_what_is_beyond(tmp_path):
    vectors = np.random.default_rng(1).uniform(-1, 1, (1024, len(FACETS), 8)) * np.arange(8)
    vectors[600, 0, 3] = 1000
    path = write(tmp_path / "0.zarr", vectors, storage="int8")
    read = store.Embeddings.open([path], "scenes").rows(np.arange(1024))
    steps = zarr.open_array(path / "scenes/scales", mode="r")[:]
    assert steps[0, 0, 1:] / np.arange(1, 8) == pytest.approx(1.25 / 127, rel=0.02)
    assert read[600, 0, 3] == pytest.approx(127 * steps[0, 0, 3], rel=1e-3)
    read[600, 0, 3] = vectors[600, 0, 3] = 0
    assert (np.abs(read - vectors) <= 0.5 * steps + 4e-3).all()
    assert (read[:, 0, 0] == 0).all()


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_8_bits_go_on_to_the_same_bytes_and_are_read_by_facet_and_cache(tmp_path, vectors, storage):
    whole = write(tmp_path / "whole" / "0.zarr", vectors, storage=storage)
    other = tmp_path / "cut" / "0.zarr"
    store.create(other, ATTRIBUTES)
    keys = [f"key-{i}" for i in range(len(vectors))]
    for count in (1, 9):
        writer = store.Writer(other, "scenes", keys=keys, facets=FACETS, dim=DIM, storage=storage)
        for rows in writer.missing()[:count]:
            writer.write(rows, vectors[rows.start : rows.stop])
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file()]
    assert all((whole / file).read_bytes() == (other / file).read_bytes() for file in files)
    plain, cached = (store.Embeddings.open([whole], "scenes", cache_bytes=b) for b in (0, 1 << 30))
    indices = np.array([1299, 3, 3, 700])
    every = plain.rows(indices)
    assert every.dtype == np.float16
    for facets in (["scene"], ["mood", "category"]):
        columns = [FACETS.index(name) for name in facets]
        np.testing.assert_array_equal(plain.rows(indices, facets), every[:, columns])
        np.testing.assert_array_equal(cached.rows(indices, facets), every[:, columns])


def opened_files(path: Path, action: Callable[[], object]) -> list[str]:
    """Files below a folder that are opened during a call, by any thread."""
    seen: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "open" and str(arguments[0]).startswith(str(path)):
            seen.append(str(arguments[0]))

    sys.addaudithook(watch)  # stays until the process ends
    action()
    watching = False
    return seen


@pytest.mark.parametrize("storage", ["float16", "fp8", "int8"])
def test_opening_a_part_takes_the_same_few_files_for_any_number_of_rows(
    tmp_path, monkeypatch, storage
):
    monkeypatch.setattr(store, "SHARD_ROWS", 16)
    rng, counts = np.random.default_rng(0), []
    for rows in (16, 640):  # of one shard, and of forty
        folder = tmp_path / str(rows)
        vectors = rng.standard_normal((rows, len(FACETS), DIM)).astype(np.float32)
        path = write(folder / "0.zarr", vectors, storage=storage)
        shards = [*path.glob("scenes/embeddings/c/*/0/0")]
        assert len(shards) == rows // 16
        beside = [file for file in path.rglob("*") if file.is_file() and file not in shards]
        read = lambda path=path: store.Embeddings.open([path], "scenes").rows(np.arange(3))  # noqa: E731
        counts.append((len(beside), len(opened_files(path, read))))
    assert counts[0] == counts[1]
    assert counts[0][1] < 20


def test_what_a_worker_is_sent_is_small_and_reads_the_same(parts, vectors):
    for cache_bytes in (0, 1 << 30):
        embeddings = store.Embeddings.open(parts, "scenes", cache_bytes=cache_bytes)
        indices = np.random.default_rng(1).integers(len(vectors), size=64)
        request = embeddings.request(indices, ["mood", "category"])
        sent = pickle.dumps(request)
        assert len(sent) < 4096
        expected = embeddings.rows(indices, ["mood", "category"])
        np.testing.assert_array_equal(request(), expected)
        np.testing.assert_array_equal(pickle.loads(sent)(), expected)


def test_what_an_older_version_began_is_begun_anew(tmp_path, vectors, monkeypatch):
    path = tmp_path / "0.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", 2)
        write(path, vectors)
    store.create(path, ATTRIBUTES)
    keys = [f"key-{i}" for i in range(len(vectors))]
    writer = store.Writer(path, "scenes", keys=keys, facets=FACETS, dim=DIM)
    assert len(writer.missing()) == 3


def test_zarr_reads_the_checksums(parts, vectors):
    sums = zarr.open_array(parts[0] / "scenes" / "checksums", mode="r")
    assert sums.nchunks == 1
    vector = vectors[600, 2].astype("<f2").tobytes()
    assert sums[600, 2] == google_crc32c.value(vector)
