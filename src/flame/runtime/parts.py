"""Jobs that are split into parts: which rows a part has, and whether all parts fit together."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def rows_of(total: int, part: int, parts: int) -> range:
    """Rows of one of several parts: consecutive, without gaps or overlaps.

    Args:
        total: rows of all parts.
        part: number of the part, in [0, parts).
        parts: how many there are. Their sizes differ by at most one row; some are empty if there
            are more parts than rows.

    Raises:
        ValueError: no such part.
    """
    if part >= parts:
        raise ValueError(f"part {part} of {parts}; known: 0 to {parts - 1}")
    return range(total * part // parts, total * (part + 1) // parts)


def agreed(
    found: Mapping[Path, Mapping[str, Any]],
    own: Collection[str],
    wanted: Mapping[str, Any] | None = None,
) -> dict[Path, Mapping[str, Any]]:
    """Parts in order, if they are complete and made alike.

    Args:
        found: path -> description of every part, with its `part` and the number of `parts`.
        own: names in a description that may differ between parts.
        wanted: what every description has to be apart from `own` and `parts`; by default that of
            the first part.

    Returns:
        The same, sorted by part.

    Raises:
        ValueError: a part is missing or given twice, or two descriptions differ.
    """
    ordered = dict(sorted(found.items(), key=lambda item: item[1]["part"]))
    numbers = [about["part"] for about in ordered.values()]
    first, reference = next(iter(ordered.items()))
    if numbers != list(range(reference["parts"])):
        raise ValueError(
            f"{first.parent}: found parts {numbers}, expected all of {reference['parts']} parts"
        )
    if wanted is not None:
        first, reference = Path("the study"), {**wanted, "parts": reference["parts"]}
    for path, about in ordered.items():
        for name in sorted((about.keys() | reference.keys()) - set(own)):
            # As JSON: among parts the order of keys matters too, as it is that of the facets.
            here, there = (
                json.dumps(each.get(name), sort_keys=wanted is not None)
                for each in (about, reference)
            )
            if here != there:
                raise ValueError(f"{path} and {first} differ in {name}: {here} and {there}")
    return ordered
