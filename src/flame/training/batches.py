"""What a training step reads. Needs neither polars nor Zarr.

Shapes: B images of this process, S pixels, K facets of a step, D width of the embeddings, or
number of tokens for methods that read the captions themselves.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def generator(*purpose: object) -> torch.Generator:
    """CPU generator seeded by its purpose, such as `generator("order", seed, epoch)`."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Batch(NamedTuple):
    """Input of one process for one step."""

    images: Tensor  # (B, 3, S, S) uint8
    texts: Tensor  # (B, K, D) float16, or int32 tokens
    columns: Tensor  # (K,) int64, indices of the K facets among all target facets


class Schedule(Protocol):
    """All batches of a training run: item i is the batch of this process at step i.

    Attributes:
        facets: (kind, facet) of each target facet, in the order of `Batch.texts`.
        steps_per_epoch: number of batches in an epoch.
        cached: whether all images are in memory, decoded.
    """

    facets: Sequence[tuple[str, str]]
    steps_per_epoch: int
    cached: bool

    def __len__(self) -> int:
        """Number of steps."""
        ...

    def __getitem__(self, step: int) -> Batch:
        """Batch of this process at a step."""
        ...
