"""What the paper reports: rows of a CSV file, one number or text a row."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from flame.runtime.errors import known
from flame.study.schema.tables import Reported


def read(path: Path, reported: Reported) -> pl.DataFrame:
    """Rows that belong to a table or a figure, all columns as text.

    Raises:
        ValueError: there are none.
    """
    found = matching(pl.read_csv(path, infer_schema=False), reported.file, reported.match)
    if found.is_empty():
        raise ValueError(f"{reported.file}: no rows have {reported.match}")
    return found


def number(rows: pl.DataFrame, file: str, wanted: Mapping[str, str | int]) -> float | None:
    """The one number of some rows; None where the paper's is not readable.

    Args:
        rows: from `read`.
        file: where they are from, for errors.
        wanted: column -> value. Several rows may match if they say the same: Table 7 prints its
            default model twice.

    Raises:
        ValueError: no row matches, or some that differ.
    """
    found = matching(rows, file, wanted)["value"].unique()
    if len(found) != 1:
        raise ValueError(f"{file}: {len(found)} different numbers, not one, have {dict(wanted)}")
    return None if found.item() is None else float(found.item())


def matching(rows: pl.DataFrame, file: str, wanted: Mapping[str, str | int]) -> pl.DataFrame:
    """Rows whose columns have the values that are wanted."""
    for name in wanted:
        if name not in rows.columns:
            raise ValueError(f"{file}: no column {known(name, rows.columns)}")
    return rows.filter(*(pl.col(name) == str(value) for name, value in wanted.items()))
