"""What a machine decides of a training: time and memory, and of the numbers only the rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from flame.runtime.device import compiler_fault
from flame.towers.base import Tower
from flame.training.processes import batch_norms


@dataclass(frozen=True)
class Speed:
    """Speed settings of a training. They are no part of a study and of no fingerprint.

    Args:
        micro_batch: images that pass through the towers at a time, per process, with the gradient
            of the whole batch. auto: as many as fit the GPU; on a CPU all.
        grad_checkpointing: whether activations are recomputed in the backward pass instead of
            kept. auto: if the GPU is too small for micro-batches without it; on a CPU never.
        compile: backend of torch.compile for the visual backbone, such as inductor; none: not
            compiled.
    """

    micro_batch: int | Literal["auto"] = "auto"
    grad_checkpointing: Literal["auto", "always", "never"] = "auto"
    compile: str = "none"

    def __post_init__(self) -> None:
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise ValueError(f"micro_batch {self.micro_batch} is less than 1")


DEFAULT = Speed()


def check(speed: Speed, tower: Tower, images: int) -> None:
    """Refuse settings with which a tower would learn something else.

    Args:
        speed: the settings.
        tower: to be trained.
        images: in the batch of a process.

    Raises:
        ValueError: the tower has BatchNorm, and sees the batch in parts, or sees it twice.
    """
    if not batch_norms(tower):
        return
    if speed.micro_batch != "auto" and speed.micro_batch < images:
        raise ValueError(
            f"micro_batch {speed.micro_batch} of {images} images: BatchNorm needs the statistics "
            "of all; use micro_batch auto, or more processes"
        )
    if speed.grad_checkpointing == "always":
        raise ValueError(
            "grad_checkpointing always: BatchNorm would count every batch twice; use never"
        )


def check_compiler(backend: str, device: torch.device) -> None:
    """Refuse a backend of torch.compile that does not work here.

    Args:
        backend: of torch.compile, or none.
        device: where to compute.

    Raises:
        ValueError: there is no such backend, or it misses something, such as a C++ compiler.
    """
    fault = None if backend == "none" else compiler_fault(backend, device)
    if fault:
        raise ValueError(f"compile {backend}: {fault}; compile none trains without torch.compile")


@contextmanager
def fast_products(enabled: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 in TF32 in this block, on GPUs that have it.

    In a tower that computes in bfloat16, these are the products of the loss. TF32 keeps 10 bits of
    a factor behind the point where bfloat16 keeps 7, and sums in float32: its error is below that
    of the features. Where a recipe says float32, nothing is in TF32: not even convolutions, which
    torch allows by default.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
