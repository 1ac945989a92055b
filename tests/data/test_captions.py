"""captions.parquet: row n of a kind is text n, and a kind that is not there is named."""

import polars as pl
import pytest

from flame.data import captions
from flame.runtime.checksums import seal

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
