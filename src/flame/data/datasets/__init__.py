"""Data sets, one module each, found by file name; all speak in `Sample`.

Every module has `CARD` (`Card`), `Options` (frozen, pydantic), and the functions:

- `read(root, options, seed) -> Iterator[Sample | Skipped]`: `root` keeps what is fetched;
- `size(options) -> int`: number of images, known before the download;
- `classes(root, options) -> dict[str, list[str]]`: label -> texts of the class; empty without.

It may have `exact(options) -> bool`, False where `size` is no more than what is to be expected, and
`report(root, options) -> dict`, what the manifest tells besides. `python -m flame.data.datasets`
prints all cards as docs/datasets.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with all that is known about it.

    Args:
        key: unique in its data set, without "." and "/" (WebDataset cuts member names there).
        image: encoded image; the download brings what is neither PNG nor JPEG into PNG.
        captions: kind (raw, short, long, positive, negative) -> texts.
        label: class of the image, where the set is one for classification.
    """

    key: str
    image: bytes
    captions: dict[str, list[str]]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that is left out, and why; a reader yields it in place of the sample."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Card:
    """What there is to know of a data set before it is downloaded.

    Args:
        title: its name in the field.
        source: hub id or address of an archive, with revision or checksum.
        licence: as its publisher states it.
        splits: name of a split -> images that are expected of it.
        texts: what texts there are of an image, or of a class.
        bytes: of the download; None if nobody has told.
        needs: what a person has to do first: a token, a form, files to place.
        notes: which split, captions and templates the protocol takes, and how others differ.
        used_in: tables and figures of the paper.
    """

    title: str
    source: str
    licence: str
    splits: Mapping[str, int] = field(default_factory=dict)
    texts: str = ""
    bytes: int | None = None
    needs: str = "nothing"
    notes: str = ""
    used_in: str = ""


def names() -> list[str]:
    """All data sets, by the names of their modules."""
    return sorted(found.name for found in iter_modules(__path__) if not found.name.startswith("_"))


def module(name: str) -> ModuleType:
    """The module of a data set, by its file name."""
    known = names()
    if name not in known:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(known)}")
    return import_module(f"{__name__}.{name}")
