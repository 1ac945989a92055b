"""What a machine decides of a training: time and memory, and of the numbers only the rounding."""

from dataclasses import dataclass
from typing import Literal


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
