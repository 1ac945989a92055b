"""Calls that read arrays in this process, or in a worker that they are sent to."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# A call that reads an array. It holds what it takes to read it, such as paths and row numbers, and
# is small, so that a worker needs nothing else.
Request = Callable[[], np.ndarray]


@dataclass(frozen=True)
class HereOrThere:
    """A request to this process, which becomes another one when it is sent to a worker.

    Attributes:
        here: reads from what this process keeps in memory.
        there: returns the request that a worker gets instead.
    """

    here: Request
    there: Callable[[], Request]

    def __call__(self) -> np.ndarray:
        """The array."""
        return self.here()

    def __reduce__(self) -> tuple[Callable[[Request], Request], tuple[Request]]:
        """What is pickled."""
        return _itself, (self.there(),)


def _itself(request: Request) -> Request:
    return request
