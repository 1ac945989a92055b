"""A CSV of results as an aligned table of plain text, for a terminal."""

import re
import textwrap
from collections.abc import Sequence

import polars as pl

WIDTH = 40  # characters at which a cell wraps
NUMBER = re.compile(r"[+-]?\d")


def plain_table(frame: pl.DataFrame) -> str:
    """The table with each interval beside its value; transposed if that makes it narrower.

    Args:
        frame: columns of text, as in the CSV. The ends of an interval are in the columns
            `<name> 95% low` and `<name> 95% high`, the value in `<name>` or `<name> [<data set>]`.
    """
    columns = _fold_intervals(frame.fill_null("").to_dict(as_series=False))
    upright = [[name, *values] for name, values in columns.items()]
    across = [list(line) for line in zip(*upright, strict=True)]
    return min(_aligned(across), _aligned(upright), key=_width)


def _fold_intervals(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Columns in which `4.2`, `0.0` and `12.5` became `4.2 (0.0 to 12.5)`."""
    folded = dict(columns)
    for low in (name for name in columns if name.endswith(" 95% low")):
        base = low.removesuffix(" 95% low")
        value = next((c for c in columns if c == base or c.startswith(f"{base} [")), None)
        if value is None:
            continue
        lows, highs = folded.pop(low), folded.pop(f"{base} 95% high")
        stds = folded.pop(f"{base} std", [""] * len(lows))
        folded[value] = [
            f"{v}{f' ± {std}' if std else ''} ({start} to {end})" if v else ""
            for v, std, start, end in zip(columns[value], stds, lows, highs, strict=True)
        ]
    return folded


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text; numbers are aligned to the right, long texts wrap."""
    wrapped = [[textwrap.wrap(cell, WIDTH) or [""] for cell in line] for line in lines]
    columns = list(zip(*wrapped, strict=True))
    widths = [max(len(part) for cell in column for part in cell) for column in columns]
    numeric = [all(NUMBER.match(cell[0]) for cell in column[1:] if cell[0]) for column in columns]
    texts = []
    for line in wrapped:
        for i in range(max(map(len, line))):
            parts = [cell[i] if i < len(cell) else "" for cell in line]
            texts.append(
                "  ".join(
                    part.rjust(width) if right else part.ljust(width)
                    for part, width, right in zip(parts, widths, numeric, strict=True)
                ).rstrip()
            )
        if line is wrapped[0]:
            texts.append("  ".join("-" * width for width in widths))
    return "\n".join([*texts, ""])


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))
