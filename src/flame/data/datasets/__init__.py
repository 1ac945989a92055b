"""Data sets, one module each, found by file name; all of them yield `Sample`.

Every module has `CARD` (`Card`), `Options` (frozen, pydantic), and the functions:

- `read(root, options, seed) -> Iterator[Sample | Skipped]`: `root` is the folder for downloads;
- `size(options) -> int`: number of images, known before the download;
- `classes(root, options) -> dict[str, list[str]]`: label -> texts of the class; may be empty.

Optional are `exact(options) -> bool`, False if `size` is only an estimate,
`report(root, options) -> dict`, extra fields of the manifest, `ATTRIBUTES`, names of the attributes
of its samples, and `VERSION`, an integer that is raised when the same options give other samples.
`python -m flame.data.datasets` prints all cards as docs/datasets.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from flame.runtime.errors import known


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions and label.

    Args:
        key: unique in its data set, without "." and "/" (WebDataset cuts member names there).
        image: encoded image; the download converts anything but PNG and JPEG to PNG.
        captions: kind (raw, short, long, positive, negative) -> texts.
        label: class of the image, in a classification data set.
        attributes: name -> what the image shows, in a data set that knows; None if it does not
            apply. Every image has the same names.
        more: other images with the same captions, of which a training takes one an epoch in turn.
    """

    key: str
    image: bytes
    captions: dict[str, list[str]]
    label: str | None = None
    attributes: Mapping[str, str | None] = field(default_factory=dict)
    more: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that is left out, and why; yielded in place of the sample."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Card:
    """Facts about a data set that are known before it is downloaded.

    Args:
        title: its name in the field.
        source: hub id or address of an archive, with revision or checksum.
        licence: as its publisher states it.
        splits: name of a split -> expected number of images.
        texts: captions per image, or texts per class.
        captions: of a kind per image, at most; memory is asked for by it.
        bytes: of the download; None if unknown.
        needs: manual steps: a token, a form, files to place.
        notes: split, captions and templates of the protocol, and how other protocols differ.
        used_in: tables and figures of the paper.
        drawn: whether a program draws it, so that it only stands in for a benchmark of the field.
    """

    title: str
    source: str
    licence: str
    splits: Mapping[str, int] = field(default_factory=dict)
    texts: str = ""
    captions: int = 1
    bytes: int | None = None
    needs: str = "nothing"
    notes: str = ""
    used_in: str = ""
    drawn: bool = False


def names() -> list[str]:
    """All data sets, by the names of their modules."""
    return sorted(found.name for found in iter_modules(__path__) if not found.name.startswith("_"))


def module(name: str) -> ModuleType:
    """The module of a data set, by its file name."""
    if name not in names():
        raise ValueError(f"unknown data set {known(name, names())}")
    return import_module(f"{__name__}.{name}")


def version(name: str) -> int:
    """Version of the samples of a data set's module."""
    return getattr(module(name), "VERSION", 0)
