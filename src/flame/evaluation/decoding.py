"""Decoded images in batches, by worker processes or in this process; the pixels are the same."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flame.data.images import ImageReader

ITEM_IMAGES = 64  # of a work item: 9.6 MB at 224 pixels


class Item(NamedTuple):
    """Images that a worker decodes at a time."""

    root: Path
    rows: Sequence[int]
    size: int
    resize: str


class Decoder:
    """Decodes images of any data set, in workers that live as long as the job."""

    def __init__(self, workers: int = 0) -> None:
        """Workers start with the first images.

        Args:
            workers: number of processes; 0 decodes in this one.
        """
        self._workers = workers
        self._items: list[Item] = []
        self._loader: DataLoader[Tensor] | None = None

    def batches(
        self, reader: ImageReader, rows: Sequence[int], size: int, resize: str, batch_size: int
    ) -> Iterator[Tensor]:
        """Images of a data set.

        Args:
            reader: of the data set.
            rows: I rows of its index, in order.
            size: side of the square images, in pixels.
            resize: how they are made square, a name of `flame.data.pixels.RESIZES`.
            batch_size: B.

        Yields:
            (B, 3, size, size) uint8 in 0..255, in pinned memory if there is a GPU; the last one
            may be smaller.
        """
        chosen = _parts(rows, batch_size)
        if self._workers == 0:
            yield from (_joined([reader.load(part, size, resize)]) for part in chosen)
            return
        items = [
            [Item(reader.root, part, size, resize) for part in _parts(batch, ITEM_IMAGES)]
            for batch in chosen
        ]
        decoded = self._decoded([item for batch in items for item in batch])
        for batch in items:
            yield _joined([next(decoded) for _ in batch])

    def _decoded(self, items: list[Item]) -> Iterator[Tensor]:
        self._items[:] = items
        if self._loader is None:
            self._loader = DataLoader(
                _Decoding(),
                batch_size=None,
                sampler=self._items,  # read again for each data set
                num_workers=self._workers,
                persistent_workers=True,
                multiprocessing_context="spawn",
            )
        return iter(self._loader)


class _Decoding(Dataset[Tensor]):
    """Work items -> pixels. A worker opens a data set when it first reads of it."""

    def __getitem__(self, item: Item) -> Tensor:
        return _reader(item.root).load(item.rows, item.size, item.resize)


@lru_cache(maxsize=2)
def _reader(root: Path) -> ImageReader:
    return ImageReader(root)


def _parts(rows: Sequence[int], length: int) -> list[Sequence[int]]:
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One batch of the images of several work items."""
    if not torch.cuda.is_available():
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    size = sum(map(len, parts)), *parts[0].shape[1:]
    return torch.cat(list(parts), out=torch.empty(size, dtype=torch.uint8, pin_memory=True))
