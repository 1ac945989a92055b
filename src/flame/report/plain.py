"""A CSV of results as an aligned table of plain text, for a terminal."""

import re
import textwrap
from collections.abc import Sequence

import polars as pl

WIDTH = 120  # characters of a line, if the table can be that narrow
NARROWEST = 12  # characters to which a column of text shrinks
NUMBER = re.compile(r"[+-]?\d")
STAND_IN = re.compile(r"^.* \(for (.*)\)")
ENDS = (" 95% low", " 95% high")

Cell = list[str]  # lines
Line = Sequence[Cell]


def plain_table(frame: pl.DataFrame, width: int = WIDTH) -> str:
    """The table with each interval below its value; transposed if it is too wide otherwise.

    Args:
        frame: columns of text, as in the CSV. The ends of the interval of a column `<name>` are in
            `<name> 95% low` and `<name> 95% high`, or in `low` and `high` if it is `value`; its
            standard deviation is in `<name> std` or `std`. A column of the paper's numbers ends in
            ` paper`.
        width: characters of a line.
    """
    upright = _columns(frame.fill_null("").to_dict(as_series=False))
    lines = list(zip(*upright, strict=True))
    across = _aligned(lines, width)
    if _width(across) <= width or len(lines) < 2:
        return across
    transposed = _aligned(upright, width)
    return min(transposed, across, key=lambda text: max(_width(text), width))


def _columns(columns: dict[str, list[str]]) -> list[Line]:
    """Columns of cells under their heads, without those that are shown within other cells."""
    shown: list[Line] = []
    before = ""
    for name, values in columns.items():
        if _is_detail(name, columns):
            continue
        # The paper's number stands right after the measured one, whose name says it all.
        paper = STAND_IN.sub(r"\1", before) + " paper"
        head = "  paper" if name == paper else name
        before = name
        shown.append([[head], *_cells(name, values, columns)])
    return shown


def _details(name: str) -> tuple[str, str, str]:
    """Columns with the ends of the interval and the standard deviation of a column."""
    if name == "value":
        return "low", "high", "std"
    return *(f"{name}{end}" for end in ENDS), f"{name} std"  # type: ignore[return-value]


def _is_detail(name: str, columns: dict[str, list[str]]) -> bool:
    return any(name in _details(other) for other in columns)


def _cells(name: str, values: list[str], columns: dict[str, list[str]]) -> list[Cell]:
    """`12.5 ± 0.3` and below it `8.1 to 16.0`."""
    empty = [""] * len(values)
    low, high, std = (columns.get(detail, empty) for detail in _details(name))
    cells = []
    for value, start, end, spread in zip(values, low, high, std, strict=True):
        text = f"{value} ± {spread}" if spread else value
        cells.append([text, f"{start} to {end}"] if value and start and end else [text])
    return cells


def _aligned(lines: Sequence[Line], width: int) -> str:
    """Lines of cells as text; columns of numbers are aligned to the right, long texts wrap."""
    columns = list(zip(*lines, strict=True))
    numeric = [_is_numeric([cell[0] for cell in column[1:] if cell[0]]) for column in columns]
    wrapped = [
        [_wrap(cell, room) for cell in column]
        for column, room in zip(columns, _rooms(columns, width), strict=True)
    ]
    widths = [max(len(part) for cell in column for part in cell) for column in wrapped]
    texts: list[str] = []
    for number, line in enumerate(zip(*wrapped, strict=True)):
        for i in range(max(map(len, line))):
            parts = [cell[i] if i < len(cell) else "" for cell in line]
            texts.append(
                "  ".join(
                    part.rjust(room) if right else part.ljust(room)
                    for part, room, right in zip(parts, widths, numeric, strict=True)
                ).rstrip()
            )
        if number == 0:
            texts.append("  ".join("-" * room for room in widths))
    return "\n".join([*texts, ""])


def _rooms(columns: Sequence[Line], width: int) -> list[int]:
    """Characters of each column: the widest shrinks until all fit, or none can."""
    rooms = [max(len(part) for cell in column for part in cell) for column in columns]
    floors = [
        min(room, max(NARROWEST, *(_least(cell) for cell in column)))
        for room, column in zip(rooms, columns, strict=True)
    ]
    while sum(rooms) + 2 * (len(rooms) - 1) > width:
        able = [i for i, room in enumerate(rooms) if room > floors[i]]
        if not able:
            break
        rooms[max(able, key=rooms.__getitem__)] -= 1
    return rooms


def _least(cell: Cell) -> int:
    """Characters of its longest word, or of a value and its interval, which stay whole."""
    parts = cell if len(cell) > 1 else cell[0].split()
    return max(map(len, parts), default=0)


def _is_numeric(texts: Sequence[str]) -> bool:
    return bool(texts) and all(map(NUMBER.match, texts))


def _wrap(cell: Cell, room: int) -> Cell:
    """A cell within a width; words are never broken."""
    if len(cell) > 1 or len(cell[0]) <= room:
        return cell
    lead = "  " if cell[0].startswith("  ") else ""
    return textwrap.wrap(
        cell[0],
        room,
        subsequent_indent=lead,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))
