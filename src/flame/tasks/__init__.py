"""Kinds of question that can be asked of a tower: one module each, found by its file name.

Every module has one function::

    evaluate(images, image_keys, image_labels, texts, text_keys) -> Answer

    images: (I, d) float, unit norm; image features, one row per image.
    image_keys: I names, unique.
    image_labels: I class labels, or None for an image without one.
    texts: (T, d) float, unit norm; text features, one row per caption or class template.
    text_keys: T names; which image, or which class, a text belongs to.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from flame.config import known, task_names


class Hits(NamedTuple):
    """One metric, query by query: its value is the mean of `hit`."""

    keys: Sequence[str]
    hit: Tensor
    """(queries,) bool."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task found out."""

    metrics: dict[str, Hits]
    images: int
    """Images that took part."""
    texts: int
    """Texts that took part."""
    unjoined: int
    """Images without a text, and texts without an image; neither took part."""


def module(name: str) -> ModuleType:
    """The task of a name."""
    if name not in task_names():
        raise ValueError(f"unknown task {known(name, task_names())}")
    return importlib.import_module(f"{__name__}.{name}")
