"""The processes of one training: where each computes, and what they exchange.

With a single process, nothing is exchanged.

Shapes: B images of this process, A images of all P processes. Item i of process r is item r + i P
of the batch of a single process.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from flame.runtime.device import device_of

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Rank of this process, number of processes, and this process's device."""

    rank: int
    processes: int
    device: torch.device


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """Join the processes that `torchrun` started, if it did.

    Args:
        device: "cpu", "cuda", or "auto": the GPU if there is one.
    """
    place = device_of(device)
    if "WORLD_SIZE" not in os.environ:
        yield Place(0, 1, place)
        return
    cuda = place.type == "cuda"
    own = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(own)  # NCCL sends objects via the current device
    dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(value: Any) -> Any:
    """Value of the first process, in all processes."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Largest of each value in any process; the same answer in all."""
    if not dist.is_initialized():
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def mean(values: Tensor) -> Tensor:
    """Mean over the processes, without gradient, of values of any shape."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.AVG)
    return values


def gather(features: Tensor) -> Tensor:
    """Features of all processes, (B, ...) -> (A, ...), in the order of their ranks.

    The gradient flows back to the process that a feature came from. Features without a gradient,
    such as text embeddings of a frozen LLM, cost no second exchange.
    """
    return _Gathered.apply(features) if dist.is_initialized() else features


def batch_norms(tower: nn.Module) -> list[nn.Module]:
    """Layers of a tower that mix the images of a batch."""
    return [each for each in tower.modules() if isinstance(each, _BatchNorm)]


def sync_batch_norm(tower: nn.Module, place: Place) -> None:
    """Let every BatchNorm of a tower use the statistics of the whole batch, where torch can.

    On GPUs each BatchNorm is replaced by torch's SyncBatchNorm, with the same parameters under the
    same names. There is no SyncBatchNorm for CPUs: each process then normalizes its own share of
    the batch, and the result depends on the number of processes. Several processes on CPUs serve
    tests only, so this is logged and not worked around.

    Args:
        tower: before it is wrapped by `DistributedDataParallel`.
        place: of this process.
    """
    norms = batch_norms(tower)
    if place.processes == 1 or not norms:
        return
    if place.device.type == "cuda":
        convert_sync_batchnorm(tower)  # torch's own conversion drops the activation of timm's norms
    elif place.rank == 0:
        log.warning("%d BatchNorm layers use the statistics of each process alone", len(norms))


class _Gathered(torch.autograd.Function):
    """All-gather whose backward pass is a reduce-scatter.

    `torch.distributed.nn.functional.all_gather` is deprecated, and its successor is private.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        size = len(features) * dist.get_world_size(), *features.shape[1:]
        whole = features.new_empty(size)
        dist.all_gather_into_tensor(whole, features.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        size = len(gradient) // dist.get_world_size(), *gradient.shape[1:]
        own = gradient.new_empty(size)
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
