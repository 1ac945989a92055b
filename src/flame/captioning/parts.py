"""One Parquet file per captioning job, with a description of how its captions were made.

A job writes chunks, which survive an interruption, and merges them into its part at the end. The
description is JSON in the metadata of the file, so a part can never be separated from it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from flame.data import captions
from flame.runtime.resumable import write_atomic

PART = "part.parquet"
ABOUT = "flame"  # key of the description in the metadata of a file
COUNTS = ("images", "broken", "unknown", "double")


class Row(NamedTuple):
    """A caption and its flags; the text is None where there is no caption.

    Flags are joined by commas: the faults of the first attempt (and of the second), then `retried`,
    and `fallback` where the raw caption is used instead or `dropped` where there is none; `broken`
    alone for an image that cannot be read.
    """

    key: str
    kind: str
    text: str | None
    flags: str


def chunk_path(folder: Path, number: int) -> Path:
    """Path of a chunk by number; chunks are merged in this order."""
    return folder / f"chunk-{number:05d}.parquet"


def write_chunk(path: Path, rows: Sequence[Row], **counts: float) -> None:
    """Write one chunk of a part, with counts that `merge_chunks` can sum."""
    table = captions.table(rows)
    about = {ABOUT: json.dumps(counts)}
    write_atomic(path, lambda temporary: table.write_parquet(temporary, metadata=about))


def merge_chunks(folder: Path, about: Mapping[str, Any]) -> None:
    """Write `PART` from all chunks of a folder, with its description."""
    metadata = {ABOUT: json.dumps(about)}
    chunks = pl.scan_parquet(_chunks(folder), schema=captions.SCHEMA)
    write_atomic(folder / PART, lambda path: chunks.sink_parquet(path, metadata=metadata))


def total_counts(folder: Path) -> dict[str, float]:
    """Images, unreadable images and seconds, summed over the chunks of a folder."""
    each = [description(path) for path in _chunks(folder)]
    return {name: sum(counts[name] for counts in each) for name in ("images", "broken", "seconds")}


def description(path: Path) -> dict[str, Any]:
    """Description of a part or a chunk.

    Raises:
        ValueError: the file is broken, or was not written by `caption`.
    """
    try:
        metadata = pl.read_parquet_metadata(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} is broken: {error}; delete it and run again") from error
    if ABOUT not in metadata:
        raise ValueError(
            f"{path} does not say how its captions were made: `caption` did not write it"
        )
    return json.loads(metadata[ABOUT])


def _chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("chunk-*.parquet"))
