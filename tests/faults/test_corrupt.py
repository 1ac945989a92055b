"""What is broken or does not belong is told by name, and never used."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flame import store
from test_store import ATTRIBUTES, FACETS, write


def flipped(data: bytes, place: int) -> bytes:
    """The same but for one bit."""
    changed = bytearray(data)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


@pytest.fixture(scope="module", params=["float16", "fp8", "int8"])
def whole(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 100 rows in each way of storing them."""
    vectors = np.random.default_rng(0).standard_normal((100, len(FACETS), 8))
    folder = tmp_path_factory.mktemp("store")
    return write(folder / "0.zarr", vectors, storage=request.param)


def content(path: Path) -> tuple:
    """All that a stage sees of a store."""
    embeddings = store.Embeddings.open([path], "scenes")
    rows = embeddings.rows(np.arange(len(embeddings.keys)))
    return embeddings.attributes, embeddings.keys, rows.tobytes()


def outcome(path: Path) -> tuple[tuple | None, str]:
    """What a stage sees of a store, or what is said against it."""
    try:
        return content(path), ""
    except ValueError as error:
        return None, str(error)


def files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


@contextmanager
def replaced(path: Path, data: bytes | None) -> Iterator[None]:
    """Other bytes in a file, or none at all, for a while."""
    kept = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    yield
    path.write_bytes(kept)


def test_no_bit_of_a_store_can_change_unseen(whole):
    expected, draw, refused = content(whole), random.Random(0), 0
    for file in files(whole):
        data = file.read_bytes()
        for place in {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(4))}:
            with replaced(file, flipped(data, place)):
                found, said = outcome(whole)
            # What says nothing of the rows, such as the spaces of JSON, may change.
            assert found == expected or str(whole) in said, (file, place)
            refused += bool(said)
    assert refused > 25


def test_no_file_of_a_store_can_be_missing_or_cut_unseen(whole):
    for file in files(whole):
        half = file.read_bytes()[: file.stat().st_size // 2]
        for data in (None, b"", half):
            with replaced(file, data), pytest.raises((ValueError, OSError)) as caught:
                content(whole)
            assert str(whole) in str(caught.value), (file, data)


def test_a_flipped_byte_is_found_in_what_is_read_and_only_there(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((600, len(FACETS), 8))
    path = write(tmp_path / "0.zarr", vectors)
    row, facet = 517, 1
    shard = path / "scenes/embeddings/c/1/0/0"
    place = ((row - 512) * len(FACETS) + facet) * 16 + 5  # 8 values of 2 bytes a vector
    shard.write_bytes(flipped(shard.read_bytes(), place))
    embeddings = store.Embeddings.open([path], "scenes")
    others = np.delete(np.arange(600), row)
    np.testing.assert_array_equal(embeddings.rows(others), vectors.astype(np.float16)[others])
    embeddings.rows(np.array([row]), [FACETS[0]])
    broken = rf"{shard} is broken: facet number 1 of key 'key-517'"
    with pytest.raises(ValueError, match=broken):
        embeddings.rows(np.array([3, row]), [FACETS[1]])
    with pytest.raises(ValueError, match=broken):
        embeddings.mean()
    with pytest.raises(ValueError, match=broken):
        store.Embeddings.open([path], "scenes", cache_bytes=1 << 30)


def test_a_store_of_before_there_were_checksums_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", 1)
        path = write(tmp_path / "0.zarr", np.ones((3, len(FACETS), 8)), **ATTRIBUTES)
    with pytest.raises(ValueError, match=r"0\.zarr: store format 1 is unknown; known: 2"):
        store.by_kind([path])
