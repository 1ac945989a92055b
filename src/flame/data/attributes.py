"""attributes.parquet: what the images of a data set show, where the data set knows it.

One row per image, in the order of the index. Columns: `key`, and one per attribute; null where an
attribute does not apply.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from flame.runtime.checksums import verified
from flame.runtime.errors import known

FILE = "attributes.parquet"


def write(folder: Path, rows: Iterable[tuple[str, Mapping[str, str | None]]]) -> None:
    """Write the file.

    Args:
        folder: of the data set.
        rows: key and attributes of every image.
    """
    columns = [{"key": key, **attributes} for key, attributes in rows]
    schema = dict.fromkeys(columns[0], pl.String)
    pl.DataFrame(columns, schema=schema).write_parquet(folder / FILE)


def read(folder: Path, names: Iterable[str]) -> pl.DataFrame:
    """Columns `key` and those of some attributes, in the order of the index.

    Args:
        folder: of the data set.
        names: of the attributes.

    Raises:
        ValueError: the data set has no attributes, or not all of these; or the file is corrupt.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(
            f"{folder} has no attributes of its images: its data set knows none, or it was made by "
            "an older version (then delete the folder and run again)"
        )
    frame = pl.read_parquet(verified(path))
    for name in names:
        if name not in frame.columns:
            raise ValueError(f"{folder}: no attribute {known(name, frame.columns[1:])}")
    return frame.select("key", *names)
