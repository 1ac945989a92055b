"""Kinds of benchmark, one module each, found by its file name.

Every module has one function, `evaluate(asked: Asked) -> Answer`. Only the features that it asks
for are computed. A task cannot tell whether texts come from a frozen LLM's store or from the
tower's own text encoder.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Texts:
    """T captions or class texts of one kind, in the order of the data set's captions."""

    keys: Sequence[str]
    """Image, or class, that each text belongs to."""
    read: Callable[[Sequence[int]], Tensor]
    """Rows -> their features (n, d) float, unit norm."""

    @cached_property
    def features(self) -> Tensor:
        """(T, d) float, unit norm, of all texts; a task that can do without should use `read`."""
        return self.read(range(len(self.keys)))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, with functions that compute the features it needs."""

    question: Question
    images: Callable[[], Images]
    """Images of the question's data set, in the space of the texts."""
    visual: Callable[[str], Images]
    """Backbone features of the images of a data set, before the projector."""
    texts: Callable[[str | None], Texts]
    """Texts of a kind, such as `question.captions`; ValueError for None."""


class Hits(NamedTuple):
    """One metric, query by query; its value is the mean of `hit`."""

    keys: Sequence[str]
    """Key of each query."""
    hit: Tensor
    """(queries,) bool."""
    rows: Sequence[int] | None = None
    """Row of each query among the data set's images, or its texts of the kind; None: 0, 1, 2."""
    best: Sequence[str] | None = None
    """Key of the top-ranked candidate of each query, where candidates are ranked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Metrics of one question, and how much of the data took part."""

    metrics: dict[str, Hits]
    images: int
    """Images that took part."""
    texts: int
    """Texts that took part."""
    unjoined: int
    """Images without a text and texts without an image; they took no part."""


def module(name: str) -> ModuleType:
    """Module of a task."""
    names = [task for task in task_names() if task != FEWSHOT]  # a program, not a module here
    if name not in names:
        raise ValueError(f"unknown task {known(name, names)}")
    return importlib.import_module(f"{__name__}.{name}")


def answer(asked: Asked) -> Answer:
    """Answer to one question.

    Raises:
        ValueError: what the task raised, with the name of the benchmark.
    """
    try:
        return module(asked.question.task).evaluate(asked)
    except ValueError as error:
        raise ValueError(f"benchmark {asked.question.benchmark!r}: {error}") from error
