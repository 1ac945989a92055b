"""Decoded images in batches, by worker processes or in this process; the pixels are the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from flame.data.images import ImageReader
from flame.runtime.requests import Request
from flame.training.loader import ITEM, Workers


@dataclass(frozen=True)
class Pixels:
    """Images that a worker decodes at a time."""

    request: Request

    def read(self) -> tuple[Tensor]:
        """(n, 3, S, S) uint8 in 0..255."""
        return (torch.from_numpy(self.request()),)


class Decoder:
    """Decodes images of any data set, in workers that live as long as its context."""

    def __init__(self, workers: int = 0) -> None:
        """Workers start with the first images.

        Args:
            workers: number of processes; 0 decodes in this one.
        """
        self._number = workers
        self._items: list[Pixels] = []
        self._workers: Workers | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def batches(
        self, reader: ImageReader, rows: Sequence[int], size: int, resize: str, batch_size: int
    ) -> Iterator[Tensor]:
        """Images of a data set; all must be taken before others are asked for.

        Args:
            reader: of the data set.
            rows: I rows of its index, in order.
            size: S, side of the square images, in pixels.
            resize: how they are made square, a name of `flame.data.pixels.RESIZES`.
            batch_size: B.

        Yields:
            (B, 3, S, S) uint8 in 0..255, in pinned memory if there is a GPU; the last batch may be
            smaller.

        Raises:
            ValueError: an image is broken.
            OSError: it cannot be read, or there is no room in shared memory.
        """
        chosen = _parts(np.asarray(rows), batch_size)
        if self._number == 0:
            yield from (_joined([reader.load(part, size, resize)]) for part in chosen)
            return
        items = [_parts(batch, ITEM) for batch in chosen]
        requests = [reader.request(part, size, resize) for parts in items for part in parts]
        workers = self._started([Pixels(request) for request in requests])
        for parts in items:
            yield _joined([_next(workers) for _ in parts])

    def _started(self, items: list[Pixels]) -> Workers:
        self._items[:] = items
        if self._workers is None:
            self._workers = Workers(self._items, self._number, reused=True)
        else:
            self._workers.restart()
        return self._workers


def _next(workers: Workers) -> Tensor:
    found = workers.read(Event())
    assert found is not None
    return found[0]


def _parts(rows: np.ndarray, length: int) -> list[np.ndarray]:
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One batch of the images of several work items."""
    if not torch.cuda.is_available():
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    size = sum(map(len, parts)), *parts[0].shape[1:]
    return torch.cat(list(parts), out=torch.empty(size, dtype=torch.uint8, pin_memory=True))
