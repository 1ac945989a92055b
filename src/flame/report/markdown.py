"""Markdown tables, and names of metrics for readers."""

import textwrap
from collections.abc import Iterable, Sequence


def markdown_table(lines: Iterable[Sequence[str]]) -> str:
    """Markdown table of rows of cells; the second row holds the column alignments."""
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def bullet_list(items: Iterable[str]) -> str:
    """Markdown list, wrapped so that the file is readable as plain text."""
    return "".join(
        textwrap.fill(f"- {item}", 100, subsequent_indent="  ", break_on_hyphens=False) + "\n"
        for item in items
    )


def bold(text: str | None) -> str:
    """The text in bold, or an empty cell."""
    return f"**{text}**" if text else ""


def metric_name(metric: str, *, spelled_out: bool = False) -> str:
    """`i2t_r@1` -> `I2T R@1`, `top1` -> `top-1`, `image_score` -> `image score`.

    Args:
        metric: name of the metric in the results.
        spelled_out: `image to text R@1` instead of `I2T R@1`, for axes and titles of figures.
    """
    direction, _, rest = metric.partition("_")
    directions = {"i2t": "image to text", "t2i": "text to image"}
    if spelled_out and direction in directions:
        return f"{directions[direction]} {rest.upper()}"
    words = metric.replace("_", " ")
    return words.upper() if "@" in words else words.replace("top", "top-")
