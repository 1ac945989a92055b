"""The paper's numbers and texts, from CSV files with one per row."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from flame.runtime.errors import known
from flame.study.schema.tables import Reported


def read(path: Path, reported: Reported) -> pl.DataFrame:
    """Rows of a table or a figure, all columns as text.

    Raises:
        ValueError: no row matches.
    """
    found = matching(pl.read_csv(path, infer_schema=False), reported.file, reported.match)
    if found.is_empty():
        raise ValueError(f"{reported.file}: no rows match {reported.match}")
    return found


def number(rows: pl.DataFrame, file: str, wanted: Mapping[str, str | int]) -> float | None:
    """The number of the rows that match; None where it is not legible in the paper.

    Args:
        rows: rows from `read`.
        file: their file, for errors.
        wanted: column -> value. Several rows may match if their numbers are equal: Table 7 prints
            its default model twice.

    Raises:
        ValueError: no row matches, or several rows match with different numbers.
    """
    found = matching(rows, file, wanted)["value"].unique()
    if len(found) != 1:
        raise ValueError(f"{file}: expected one number for {dict(wanted)}, found {len(found)}")
    return None if found.item() is None else float(found.item())


def matching(rows: pl.DataFrame, file: str, wanted: Mapping[str, str | int]) -> pl.DataFrame:
    """Rows whose columns have the wanted values."""
    for name in wanted:
        if name not in rows.columns:
            raise ValueError(f"{file}: no column {known(name, rows.columns)}")
    return rows.filter(*(pl.col(name) == str(value) for name, value in wanted.items()))
