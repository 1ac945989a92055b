"""The processes of one training: where each computes, and what each must know of the others.

What is written here is nothing, or the thing itself, where there is one process only.

Shapes: B images of this process, A images of all P processes. Item i of process r is item r + i P
of the batch that one process alone would have.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flame.runtime.device import device_of


class Place(NamedTuple):
    """Which of how many processes this is, and where it computes."""

    rank: int
    processes: int
    device: torch.device

    @property
    def share(self) -> slice:
        """Which items of a whole batch are those of this process."""
        return slice(self.rank, None, self.processes)


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """This process among those that `torchrun` started, or alone.

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
        torch.cuda.set_device(own)  # NCCL sends objects by way of the current device
    dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(value: Any) -> Any:
    """What the first process has, in all of them."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process; the same answer in all."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gather(features: Tensor) -> Tensor:
    """Features of all processes, (B, ...) -> (A, ...), in the order of their ranks.

    The gradient flows back to the process that a feature came from, where there is one: text
    embeddings of a frozen LLM have none, and are not waited for a second time.
    """
    return _Gathered.apply(features) if dist.is_initialized() else features


def mean(values: Tensor) -> Tensor:
    """Mean over the processes of values of any shape, with its gradient."""
    return _Mean.apply(values) if dist.is_initialized() else values


def whole_batch(place: Place, seed: int) -> AbstractContextManager[Any]:
    """Context in which a tower computes of its share what it would compute of the whole batch.

    Two things in a tower look beyond an image: BatchNorm takes the statistics of the batch, and
    stochastic depth draws for one image after the other. Other dropout stays each process's own: as
    good, but not the same as in one process.

    Args:
        place: of this process.
        seed: of the draws.
    """
    if place.processes == 1:
        return nullcontext()
    return _WholeBatch(place, torch.Generator(place.device).manual_seed(seed))


class _Gathered(torch.autograd.Function):
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


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(values, dist.ReduceOp.AVG)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each process has its own loss of the same mean: their gradients add up, and each value
        # is one of P in the mean.
        return _Mean.apply(gradient)


class _WholeBatch(TorchFunctionMode):
    """Functions that look beyond an image, replaced; torch's SyncBatchNorm knows GPUs only."""

    def __init__(self, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        self._place, self._generator = place, generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is Tensor.bernoulli_:
            return self._bernoulli(*args, **kwargs)
        return func(*args, **kwargs)

    def _bernoulli(self, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole = own.new_empty(len(own) * self._place.processes, *own.shape[1:])
        whole.bernoulli_(*args, **kwargs | {"generator": self._generator})
        return own.copy_(whole[self._place.share])


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What `functional.batch_norm` returns, (B, C, ...), with statistics of all processes."""
    if not training:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    over = [0, *range(2, input.ndim)]
    x = input.float()
    average = mean(x.mean(over, keepdim=True))
    centered = x - average
    variance = mean(centered.square().mean(over, keepdim=True))
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            running_mean.lerp_(average.flatten(), momentum)
            running_var.lerp_(variance.flatten() * count / (count - 1), momentum)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.view_as(scale)
    output = centered * scale
    if bias is not None:
        output = output + bias.view_as(scale)
    return output.to(input.dtype)
