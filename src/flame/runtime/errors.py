"""Errors that say what would have been right."""

import difflib
from collections.abc import Iterable


def known(value: object, candidates: Iterable[object]) -> str:
    """What to say of a value that is none of the known ones, with the nearest of them first."""
    names = [str(name) for name in candidates]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{value!r}{hint}; known: {', '.join(names) or 'none'}"
