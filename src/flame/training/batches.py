"""What a training step reads, and how it is read in small items. Needs neither polars nor Zarr.

Shapes: B images of this process, n images of a work item, S pixels, K facets of a step, D width of
the embeddings, or number of tokens for methods that read the captions themselves.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flame.runtime.requests import Request


def generator(*purpose: object) -> torch.Generator:
    """CPU generator seeded by its purpose, such as `generator("order", seed, epoch)`."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Batch(NamedTuple):
    """Input of one process for one step."""

    images: Tensor  # (B, 3, S, S) uint8
    texts: Tensor  # (B, K, D) float16, or int32 tokens
    columns: Tensor  # (K,) int64, indices of the K facets among all target facets


class WorkItem(NamedTuple):
    """Consecutive images of a batch and their texts, not read yet."""

    images: Request  # -> (n, 3, S, S) uint8
    texts: tuple[Request, ...]  # -> (n, K', D) each, facets in the order of `Batch.texts`

    def read(self) -> tuple[Tensor, Tensor]:
        """Images (n, 3, S, S) and texts (n, K, D)."""
        texts = [request() for request in self.texts]
        stacked = texts[0] if len(texts) == 1 else np.concatenate(texts, axis=1)
        return torch.from_numpy(self.images()), torch.from_numpy(stacked)


class Schedule(Protocol):
    """All batches of a training run, those of this process.

    Attributes:
        facets: (kind, facet) of each target facet, in the order of `Batch.texts`.
        steps_per_epoch: number of batches in an epoch.
        local_batch_size: B.
        cached: whether all images are in memory, decoded.
    """

    facets: Sequence[tuple[str, str]]
    steps_per_epoch: int
    local_batch_size: int
    cached: bool

    def __len__(self) -> int:
        """Number of steps."""
        ...

    def item(self, step: int, rows: slice) -> WorkItem:
        """Some rows of the batch at a step."""
        ...

    def columns(self, step: int) -> Tensor:
        """Facets of a step, (K,) int64, ascending."""
        ...


def read(schedule: Schedule, step: int) -> Batch:
    """The batch at a step, read by this process."""
    item = schedule.item(step, slice(0, schedule.local_batch_size))
    return Batch(*item.read(), schedule.columns(step))
