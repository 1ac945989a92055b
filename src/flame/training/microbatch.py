"""Gradient of a whole batch with the activations of one micro-batch in memory.

A contrastive loss needs the features of all images at once, but not their activations. So the
features of all micro-batches are computed first, and their graphs dropped; then the loss and its
gradient with respect to the features; then each micro-batch once more, backwards from its part of
that gradient (GradCache, arXiv 2101.06983; --accum-freq of open_clip). The result is the gradient
of the whole batch, for one forward pass more. Only BatchNorm, which mixes the images of a batch, is
not possible in this way.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flame.towers.base import Outputs, Tower

# (tower, or its wrapper; number of the micro-batch) -> outputs; random numbers depend only on these
Forward = Callable[[nn.Module, int], Outputs]


def split(images: int, micro_batch: int | Literal["auto"]) -> list[slice]:
    """Micro-batches of at most this many images, as equal as possible; auto: all in one."""
    count = 1 if micro_batch == "auto" else -(-images // micro_batch)
    return [
        slice(first, last)
        for first, last in pairwise(images * n // count for n in range(count + 1))
    ]


def backward(
    wrapped: Tower | DistributedDataParallel,
    forward: Forward,
    count: int,
    loss: Callable[[Outputs], Tensor],
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a loss to the parameters.

    Args:
        wrapped: tower, perhaps in `DistributedDataParallel`, which then averages the gradients.
        forward: outputs of a micro-batch.
        count: number of micro-batches.
        loss: of the outputs of the whole batch.

    Returns:
        The loss and 1/tau, without graph.
    """
    if count == 1:
        outputs = forward(wrapped, 0)
        value = loss(outputs)
        value.backward()
        return value.detach(), outputs.scale.detach()
    ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
    tower: Any = ddp.module if ddp else wrapped
    # Not without gradient, where kernels, and random numbers of compiled code, may be others.
    parts = [_detached(forward(tower, number)) for number in range(count)]
    whole = _leaves(parts, texts=tower.trains_texts, bias=tower.bias.requires_grad)
    sizes = [len(part.images) for part in parts]
    del parts
    value = loss(whole)
    value.backward()
    for number, gradients in enumerate(_gradients(whole, sizes)):
        # With the last micro-batch, the gradients of all are exchanged.
        with ddp.no_sync() if ddp and number < count - 1 else nullcontext():
            outputs = forward(wrapped, number)
            pairs = [p for p in zip(outputs, gradients, strict=True) if p[1] is not None]
            torch.autograd.backward([output for output, _ in pairs], [each for _, each in pairs])
    return value.detach(), whole.scale.detach()


def _detached(outputs: Outputs) -> Outputs:
    """Outputs without graph, whose activations are freed."""
    return Outputs(*(each.detach() for each in outputs))


def _leaves(parts: Sequence[Outputs], *, texts: bool, bias: bool) -> Outputs:
    """Outputs of the whole batch as leaves of a new graph."""
    return Outputs(
        torch.cat([part.images for part in parts]).requires_grad_(),
        torch.cat([part.texts for part in parts]).requires_grad_(texts),
        parts[0].scale.clone().requires_grad_(),
        parts[0].bias.clone().requires_grad_(bias),
    )


def _gradients(whole: Outputs, sizes: Sequence[int]) -> list[tuple[Tensor | None, ...]]:
    """Gradients of the outputs of each micro-batch, in the order of `Outputs`; None without one.

    Temperature and bias, of which there is one each, get theirs with the last micro-batch.
    """
    images, texts, scale, bias = (each.grad for each in whole)
    assert images is not None
    without = [None] * len(sizes)
    parts = images.split(sizes), without if texts is None else texts.split(sizes)
    pairs = list(zip(*parts, strict=True))
    return [(*pair, None, None) for pair in pairs[:-1]] + [(*pairs[-1], scale, bias)]
