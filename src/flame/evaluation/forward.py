"""Pixels -> features: forward passes of a tower over batches, whoever decodes them.

Shapes: I images, B of a batch; d width of the features.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

T = TypeVar("T")
Precision = Literal["float32", "bfloat16"]


@torch.inference_mode()
def image_features(
    encoders: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    images: int,
    device: torch.device,
    precision: Precision = "float32",
) -> list[Tensor]:
    """Features of all images by every encoder; each batch is copied to the device once.

    Args:
        encoders: (B, 3, H, W) pixels in [0, 1] -> (B, d).
        batches: (B, 3, H, W) uint8 in 0..255; from pinned memory, they are copied asynchronously.
        images: I, of all batches together.
        device: of the encoders.
        precision: of the forward passes; `bfloat16` is autocast.

    Returns:
        For each encoder (I, d) float32, unit norm, on the CPU.
    """
    found: list[Tensor] = [torch.empty(0)] * len(encoders)
    done = 0
    for batch in batches:
        pixels = batch.to(device, non_blocking=True).float() / 255
        for number, encode in enumerate(encoders):
            features = unit_vectors(encode, pixels, device, precision)
            if done == 0:  # allocated once: parts and their concatenation would be twice as much
                found[number] = torch.empty(images, features.shape[1])
            found[number][done : done + len(features)] = features
        done += len(batch)
    assert done == images
    return found


@torch.inference_mode()
def unit_vectors(
    encode: Callable[[T], Tensor], inputs: T, device: torch.device, precision: Precision
) -> Tensor:
    """Features of one batch of images or texts, (B, d) float32, unit norm, on the device."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        features = encode(inputs)
    return normalize(features.float(), dim=-1)
