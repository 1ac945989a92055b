"""captions.parquet: the texts of a data set, its only home.

One row per text, in a fixed order on which embedding stores and metrics rely: row n of a kind is
text n of that kind. Columns:

- `key`: of the image, or the label for the kind `class`;
- `kind`: `raw`, `short`, `long`, `class`, `positive`, `negative` or a language code;
- `text`: the caption;
- `flags`: what a captioner found wrong, joined by commas; empty for most.

`captions.crc32c` beside it lets a job that reads some rows of a large file check what it reads. It
has a line of JSON for each row group: the CRC32C of its rows, and how many are of each kind.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl

from flame.runtime.checksums import verified
from flame.runtime.errors import known
from flame.runtime.parts import rows_of
from flame.runtime.resumable import write_atomic

FILE = "captions.parquet"
CHECKSUMS = "captions.crc32c"
CHECKED = ("key", "kind", "text")
# Rows that can be read without the others; of files with checksums, it must stay as it is.
ROW_GROUP = 16_384
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
    """One of several parts of `of_kind`; reads the row groups of its rows only.

    Of the other rows it reads the column `kind`, which takes hardly any bytes.

    Args:
        path: `captions.parquet` of a data set or a captioner.
        kind: of the captions.
        part: number of the part, in [0, parts).
        parts: how many there are.

    Raises:
        ValueError: there are no captions of this kind, no such part, or the file is broken.
    """
    try:
        return _part_of_kind(path, kind, part, parts)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} is broken: {error}; {_delete(path)}") from error


def _part_of_kind(path: Path, kind: str, part: int, parts: int) -> pl.DataFrame:
    whole, sums = scan(path), _read_checksums(path)
    of_kind = pl.col("kind") == kind
    rows = whole.select("kind").with_row_index().filter(of_kind).select("index")
    places = rows.collect(engine="streaming")["index"]
    if sums is not None:
        found = np.bincount(places.to_numpy() // ROW_GROUP, minlength=len(sums))
        if found.tolist() != [group["kinds"].get(kind, 0) for group in sums]:
            raise ValueError(
                f"{path} is broken: its kinds do not match {CHECKSUMS}; {_delete(path)}"
            )
    if places.is_empty():
        raise _unknown(path, kind, whole)
    own = rows_of(len(places), part, parts)
    if not own:
        return whole.select("key", "text").head(0).collect()
    first, last = places[own[0]], places[own[-1]]
    start, stop = first // ROW_GROUP, last // ROW_GROUP + 1
    near = whole.slice(start * ROW_GROUP, (stop - start) * ROW_GROUP).select(CHECKED).collect()
    if sums is not None:
        for number, group in enumerate(near.iter_slices(ROW_GROUP), start):
            if _checksum(group) != sums[number]["crc32c"]:
                raise ValueError(
                    f"{path} is broken: the rows from {number * ROW_GROUP} on do not match "
                    f"{CHECKSUMS}; {_delete(path)}"
                )
    exact = near.slice(first - start * ROW_GROUP, last + 1 - first)
    return exact.filter(of_kind).select("key", "text")


def add_checksums(path: Path) -> None:
    """Write `CHECKSUMS` beside a finished file."""
    whole = pl.scan_parquet(path)
    lines = []
    for start in range(0, whole.select(pl.len()).collect().item(), ROW_GROUP):
        group = whole.slice(start, ROW_GROUP).select(CHECKED).collect()
        kinds = dict(sorted(Counter(group["kind"].to_list()).items()))
        lines.append(json.dumps({"crc32c": _checksum(group), "kinds": kinds}) + "\n")
    write_atomic(path.parent / CHECKSUMS, "".join(lines).encode())


def _read_checksums(path: Path) -> list[Any] | None:
    """Lines of `CHECKSUMS`; None for files that were made by hand, or before there were any."""
    sums = path.parent / CHECKSUMS
    if not sums.exists():
        return None
    return [*map(json.loads, verified(sums).read_text().splitlines())]


def _checksum(rows: pl.DataFrame) -> str:
    """CRC32C of the columns `CHECKED`, hexadecimal."""
    crc = 0
    for name in CHECKED:
        joined = "\0".join(rows[name].fill_null("\1"))
        crc = google_crc32c.extend(crc, f"{joined}\0".encode())
    return f"{crc:08x}"


def _delete(path: Path) -> str:
    return f"delete {path.parent} and run again"


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
