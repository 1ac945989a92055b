"""Work that is cut into parts, one job each."""


def rows_of(total: int, part: int, parts: int) -> range:
    """Rows of one of several parts: in order, with none left out and none in two.

    Args:
        total: rows of all parts.
        part: number of the part, in [0, parts).
        parts: how many there are; they differ by one row at most, and some are empty if they are
            more than the rows.

    Raises:
        ValueError: no such part.
    """
    if part >= parts:
        raise ValueError(f"part {part} of {parts}; known: 0 to {parts - 1}")
    return range(total * part // parts, total * (part + 1) // parts)
