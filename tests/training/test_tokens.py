"""Captions as tokens, against open_clip's tokenizer."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from open_clip.tokenizer import SimpleTokenizer

from flame.training.tokens import FACET, Tokens


def captions(folder: Path):
    rows = [
        ("k1", "raw", "a dog"),
        ("k0", "long", "wow"),
        ("k1", "raw", "b " * 20),
        ("k2", "raw", ""),
    ]
    path = folder / "captions.parquet"
    pl.DataFrame(rows, schema=["key", "kind", "text"], orient="row").write_parquet(path)
    return path


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_tokens_are_open_clips_in_the_order_asked_for(tmp_path, cache_bytes):
    tokens = Tokens(captions(tmp_path), "raw", 8, cache_bytes=cache_bytes)
    assert tokens.keys.to_list() == ["k1", "k1", "k2"]
    rows = tokens.rows(np.array([2, 0, 1, 0]), (FACET,))
    assert rows.shape == (4, 1, 8)
    expected = SimpleTokenizer(context_length=8)(["", "a dog", "b " * 20, "a dog"])
    assert rows[:, 0].tolist() == expected.tolist()
    assert rows[2, 0, -1] == rows[0, 0, 1] == SimpleTokenizer().eot_token_id
    assert np.array_equal(tokens.rows(np.array([2, 0, 1, 0])), rows)


def test_a_kind_without_captions_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'row'.*did you mean 'raw'.*known: long, raw"):
        Tokens(captions(tmp_path), "row", 8)
