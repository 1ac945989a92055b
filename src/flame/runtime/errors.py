"""Error texts that say what would have been right."""

import difflib
from collections.abc import Iterable


def known(value: object, candidates: Iterable[object]) -> str:
    """Text for an unknown value: `'x' (did you mean 'y'?); known: y, z`."""
    names = [str(name) for name in candidates]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{value!r}{hint}; known: {', '.join(names) or 'none'}"


def root_cause(error: BaseException) -> str:
    """First line of the error at the root of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
