"""captions.parquet: row n of a kind is text n, and a kind that is not there is named."""

import os
import random
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from flame.data import captions
from flame.runtime import checksums
from flame.runtime.checksums import seal
from flame.runtime.parts import rows_of
from tests.broken import flipped

KINDS = ("raw", "long")

ROWS = [
    ("b", "raw", "one", ""),
    ("a", "raw", "two", ""),
    ("a", "long", "three", "retried"),
    ("b", "raw", "four", ""),
    ("b", "long", None, "dropped"),
]


@pytest.fixture
def path(tmp_path):
    captions.table(ROWS).write_parquet(tmp_path / captions.FILE)
    seal(tmp_path)
    return tmp_path / captions.FILE


def test_rows_of_a_kind_keep_their_order(path):
    assert captions.of_kind(path, "raw").rows() == [("b", "one"), ("a", "two"), ("b", "four")]
    assert {kind: len(rows) for kind, rows in captions.by_kind(path).items()} == {
        "raw": 3,
        "long": 2,
    }
    assert captions.scan(path).collect().rows() == ROWS


def test_the_first_caption_of_every_key(path):
    first = captions.first_of_kind(captions.scan(path), "raw").collect()
    assert first.rows() == [("b", "one"), ("a", "two")]


def test_a_kind_that_is_not_there_is_named_with_the_others(path):
    with pytest.raises(ValueError, match=r"no captions of kind 'lon' .*'long'.*known: long, raw"):
        captions.of_kind(path, "lon")


def test_an_altered_file_is_refused(path):
    pl.read_parquet(path).head(2).write_parquet(path)
    with pytest.raises(ValueError, match=r"captions\.parquet is broken"):
        captions.of_kind(path, "raw")


def test_parts_of_a_kind_are_slices_of_it(path):
    whole = captions.of_kind(path, "raw")
    for parts in (1, 2, 3, 5):
        each = [captions.part_of_kind(path, "raw", part, parts) for part in range(parts)]
        assert [len(rows) for rows in each] == [len(rows_of(3, n, parts)) for n in range(parts)]
        assert pl.concat(each).equals(whole)
    with pytest.raises(ValueError, match="part 3 of 3"):
        captions.part_of_kind(path, "raw", 3, 3)
    with pytest.raises(ValueError, match=r"no captions of kind 'lon' .*'long'.*known: long, raw"):
        captions.part_of_kind(path, "lon", 0, 1)


def bytes_read() -> int:
    """Bytes that this process has asked of files so far."""
    about = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(about["rchar"])


@pytest.mark.parametrize("mixed", [False, True], ids=["kind after kind", "kinds mixed"])
def test_a_part_of_a_kind_reads_little_more_than_its_rows(tmp_path, mixed):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(150).hex() for _ in range(200_000)]  # do not compress to less than 150 bytes
    kinds = ["raw", "long"] * 100_000 if mixed else ["raw"] * 100_000 + ["long"] * 100_000
    keys = [f"{row:06d}" for row in range(len(texts))]
    table = pl.DataFrame({"key": keys, "kind": kinds, "text": texts, "flags": [""] * len(texts)})
    path = tmp_path / captions.FILE
    table.lazy().sink_parquet(path, row_group_size=captions.ROW_GROUP)
    before = bytes_read()
    rows = captions.part_of_kind(path, "long", 33, 100)
    spent = bytes_read() - before
    assert rows.equals(captions.of_kind(path, "long")[33_000:34_000])
    # At most the row groups at both ends, of which each holds 8 % of the file.
    assert spent < 0.2 * path.stat().st_size


def outcome(path: Path, part: int) -> tuple[pl.DataFrame | None, str]:
    """A part of the long captions, or the error."""
    try:
        return captions.part_of_kind(path, "long", part, 10), ""
    except ValueError as error:
        return None, str(error)


def test_no_bit_of_a_part_can_change_unseen(tmp_path, monkeypatch):
    """Even on a disk that changes a file without its time, which is thus not hashed again."""
    monkeypatch.setattr(captions, "ROW_GROUP", 100)
    monkeypatch.setattr(checksums, "LARGE", 1000)
    rng = random.Random(0)
    rows = [(f"{n:04d}", kind, rng.randbytes(20).hex(), "") for n in range(500) for kind in KINDS]
    path = tmp_path / captions.FILE
    table = captions.table([(*row[:2], None if row[2] < "1" else row[2], "") for row in rows])
    table.write_parquet(path, row_group_size=captions.ROW_GROUP)
    captions.add_checksums(path)
    old = time.time() - 60
    os.utime(path, (old, old))
    seal(tmp_path)
    whole, data = captions.of_kind(path, "long"), path.read_bytes()
    parts = [captions.part_of_kind(path, "long", part, 10) for part in range(10)]
    assert pl.concat(parts).equals(whole)
    refused = kept = 0
    for _ in range(40):
        path.write_bytes(flipped(data, rng.randrange(len(data))))
        os.utime(path, (old, old))
        for part in (2, 7):
            found, said = outcome(path, part)
            assert str(path) in said or (found is not None and found.equals(parts[part]))
            refused, kept = refused + bool(said), kept + (not said)
    assert refused > 5  # about a tenth of the bytes is read for each
    assert kept > 30
