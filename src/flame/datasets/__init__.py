"""Data sets, one module each, found by file name; all speak in `Sample`.

Every module has `Options` (frozen, pydantic), `SOURCE` and `LICENCE` (str), and the functions:

- `read(root, options, seed) -> Iterator[Sample]`;
- `size(options) -> int`: number of images, known before the download;
- `classes(options) -> dict[str, list[str]]`: label -> texts of the class; empty without labels.
"""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with all that is known about it.

    Args:
        key: unique in its data set, without "." and "/" (WebDataset cuts member names there).
        image: encoded PNG or JPEG.
        captions: kind (raw, short, long, positive, negative) -> texts.
        label: class of the image, where the set is one for classification.
    """

    key: str
    image: bytes
    captions: dict[str, list[str]]
    label: str | None = None


def module(name: str) -> ModuleType:
    """The module of a data set, by its file name."""
    known = sorted(found.name for found in iter_modules(__path__))
    if name not in known:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(known)}")
    return import_module(f"{__name__}.{name}")
