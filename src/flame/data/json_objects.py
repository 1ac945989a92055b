"""Objects of large JSON files, one at a time: of a list, or of JSON lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from flame.runtime.checksums import utf8

BLOCK = 1 << 16  # bytes read at a time


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON list or of JSON lines, in constant memory; none of an empty file.

    Numbers with a fraction are `Decimal`: ijson's floats would limit integers to 64 bits.

    Raises:
        ValueError: the file is neither, is truncated, is not UTF-8, or holds something else than
            objects.
    """
    with utf8(path) as file:
        start = ""
        while not start and (block := file.read(BLOCK)):
            start = block.lstrip()[:1]
    if start:
        yield from _read(path, "item" if start == "[" else "")


def _read(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        try:
            for found in ijson.items(file, prefix, buf_size=BLOCK, multiple_values=not prefix):
                if not isinstance(found, dict):
                    raise ValueError(f"{path}: {found!r:.80} is not an object")
                yield found
        except (ijson.JSONError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            if "utf" in reason.lower():
                raise ValueError(f"{path} is not UTF-8") from error
            raise ValueError(f"{path} is not a complete JSON list or lines: {reason}") from error
