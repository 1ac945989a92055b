"""Kinds of question that can be asked of a tower: one module each, found by its file name.

Every module has one function, `evaluate(asked: Asked) -> Answer`. What it asks for is computed, and
nothing else: whether the texts come from a frozen LLM's store or from the tower's own text encoder,
a task cannot tell.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from flame.runtime.errors import known
from flame.study.schema.benchmarks import FEWSHOT, task_names
from flame.study.settings import Question


class Images(NamedTuple):
    """I images of a data set, in the order of its index."""

    keys: Sequence[str]
    """Unique."""
    labels: Sequence[str | None]
    """Class of each image, None where there is none."""
    features: Tensor
    """(I, d) float, unit norm."""


class Texts(NamedTuple):
    """T captions or class texts of one kind, in the order of the data set's captions."""

    keys: Sequence[str]
    """Which image, or which class, a text belongs to."""
    features: Tensor
    """(T, d) float, unit norm."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the functions that give what is needed to answer it."""

    question: Question
    images: Callable[[], Images]
    """Images of the question's data set, in the space of the texts."""
    visual: Callable[[str], Images]
    """Images of a data set as the backbone sees them, before the projector."""
    texts: Callable[[str | None], Texts]
    """Texts of a kind, such as `question.captions`; ValueError where that names none."""


class Hits(NamedTuple):
    """One metric, query by query: its value is the mean of `hit`."""

    keys: Sequence[str]
    """Key of each query."""
    hit: Tensor
    """(queries,) bool."""
    rows: Sequence[int] | None = None
    """Place of each query among the data set's images, or its texts of the kind; None: 0, 1, 2."""
    best: Sequence[str] | None = None
    """Key of what is ranked first for each query, where something is ranked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task found out."""

    metrics: dict[str, Hits]
    images: int
    """Images that took part."""
    texts: int
    """Texts that took part."""
    unjoined: int
    """Images that lack a text, and texts that lack an image; they took no part."""


def module(name: str) -> ModuleType:
    """The task of a name."""
    names = [task for task in task_names() if task != FEWSHOT]  # a stage, not a module here
    if name not in names:
        raise ValueError(f"unknown task {known(name, names)}")
    return importlib.import_module(f"{__name__}.{name}")
