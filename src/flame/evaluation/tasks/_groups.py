"""Groups of images, named by their keys, with one caption each."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from flame.evaluation.tasks import Images, Texts


class Choice(NamedTuple):
    """One query: n images and m texts; the i-th image and the i-th text match."""

    key: str
    rows: list[int]
    """Rows of its images."""
    images: Tensor
    """(n, d)."""
    texts: Tensor
    """(m, d)."""


def groups(images: Images, captions: Texts) -> Iterator[Choice]:
    """Images with keys `<group>-0`, `<group>-1` and so on, and the caption of each.

    A group takes part if it has at least two images, all with a caption.

    Raises:
        ValueError: an image has several captions, or a key names no group.
    """
    caption = one_each(captions)
    members = defaultdict(list)
    for row, key in enumerate(images.keys):
        group, _, number = key.rpartition("-")
        if not group or not number.isdigit():
            raise ValueError(f"image key {key!r} names no group; keys must look like 'name-0'")
        members[group].append(row)
    for group, rows in members.items():
        own = [caption[images.keys[row]] for row in rows if images.keys[row] in caption]
        if len(own) == len(rows) > 1:
            yield Choice(group, rows, images.features[rows], captions.features[own])


def one_each(texts: Texts) -> dict[str, int]:
    """Key -> row of its only text.

    Raises:
        ValueError: a key has several texts.
    """
    rows = rows_of(texts)
    for key, own in rows.items():
        if len(own) > 1:
            raise ValueError(f"image {key!r} has {len(own)} true captions, expected one")
    return {key: own[0] for key, own in rows.items()}


def rows_of(texts: Texts) -> dict[str, list[int]]:
    """Key -> rows of its texts."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(texts.keys):
        rows[key].append(row)
    return dict(rows)
