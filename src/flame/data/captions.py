"""captions.parquet: the texts of a data set, its only home.

One row per text, in a fixed order on which embedding stores and metrics rely: row n of a kind is
text n of that kind. Columns:

- `key`: of the image, or the label for the kind `class`;
- `kind`: `raw`, `short`, `long`, `class`, `positive`, `negative` or a language code;
- `text`: the caption;
- `flags`: what a captioner found wrong, joined by commas; empty for most.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from flame.runtime.checksums import verified
from flame.runtime.errors import known
from flame.runtime.parts import rows_of

FILE = "captions.parquet"
ROW_GROUP = 16_384  # rows that can be read without the others
SCHEMA = {"key": pl.String, "kind": pl.String, "text": pl.String, "flags": pl.String}


def table(rows: Iterable[tuple[str, str, str | None, str]]) -> pl.DataFrame:
    """Captions as a table, from rows of key, kind, text and flags."""
    return pl.DataFrame([*rows], schema=SCHEMA, orient="row")


def scan(path: Path) -> pl.LazyFrame:
    """All captions of a verified file, not read yet.

    Raises:
        ValueError: the file does not have its recorded digest.
    """
    return pl.scan_parquet(verified(path))


def of_kind(path: Path, kind: str) -> pl.DataFrame:
    """Columns `key` and `text` of the captions of one kind, in the order of the file.

    Args:
        path: `captions.parquet` of a data set or a captioner.
        kind: of the captions.

    Raises:
        ValueError: there are no captions of this kind, or the file is broken.
    """
    whole = scan(path)
    rows = whole.filter(pl.col("kind") == kind).select("key", "text").collect()
    if rows.is_empty():
        raise _unknown(path, kind, whole)
    return rows


def part_of_kind(path: Path, kind: str, part: int, parts: int) -> pl.DataFrame:
    """One of several parts of `of_kind`; reads the texts of its rows only.

    Of the other rows it reads the column `kind`, which takes hardly any bytes, and those that share
    a row group or lie in between.

    Args:
        path: `captions.parquet` of a data set or a captioner.
        kind: of the captions.
        part: number of the part, in [0, parts).
        parts: how many there are.

    Raises:
        ValueError: there are no captions of this kind, no such part, or the file is broken.
    """
    whole = scan(path)
    of_kind = pl.col("kind") == kind
    rows = whole.select("kind").with_row_index().filter(of_kind).select("index")
    places = rows.collect(engine="streaming")["index"]
    if places.is_empty():
        raise _unknown(path, kind, whole)
    own = rows_of(len(places), part, parts)
    first, last = (places[own[0]], places[own[-1]]) if own else (0, -1)
    near = whole.slice(first, last + 1 - first)
    return near.filter(of_kind).select("key", "text").collect()


def _unknown(path: Path, kind: str, whole: pl.LazyFrame) -> ValueError:
    kinds = whole.select("kind").unique().sort("kind").collect()["kind"]
    return ValueError(f"{path.parent} has no captions of kind {known(kind, kinds)}")


def first_of_kind(captions: pl.LazyFrame, kind: str) -> pl.LazyFrame:
    """Columns `key` and `text` of the first caption of a kind per key, in the order of the file."""
    rows = captions.filter(pl.col("kind") == kind).select("key", "text")
    return rows.unique("key", keep="first", maintain_order=True)


def by_kind(path: Path) -> dict[str, pl.DataFrame]:
    """Kind -> its captions, in the order of the file."""
    groups: Any = scan(path).collect().group_by("kind", maintain_order=True)
    return {str(kind): rows for (kind,), rows in groups}
