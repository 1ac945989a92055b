"""Random crops of the images of a batch.

Shapes: B images, H x W pixels.
"""

import torch
from torch.nn import functional


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    shift: int,
    rank: int = 0,
    processes: int = 1,
) -> torch.Tensor:
    """Random crop, resized back, and random shift; no flip, because captions name left and right.

    Args:
        images: (B, 3, H, W) uint8 in 0..255 or float in [0, 1], on any device.
        generator: on the CPU, so that every device sees the same draws.
        scale: smallest and largest share of the area that a crop keeps, in (0, 1].
        shift: largest shift along each axis in pixels; the edge is repeated.
        rank: share of a larger batch that the images are: every `processes`-th, starting here.
        processes: number of shares. Each draws for the whole batch, so that an image is augmented
            in the same way whichever process has it.

    Returns:
        (B, 3, H, W) float in [0, 1]; the images themselves for scale (1, 1) and shift 0.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    if scale == (1, 1) and shift == 0:
        return pixels
    batch, _, height, width = pixels.shape
    whole, own = batch * processes, slice(rank, None, processes)
    low, high = scale
    side = (low + (high - low) * torch.rand(whole, generator=generator)[own]).sqrt()
    centre = (1 - side[:, None]) * (2 * torch.rand(whole, 2, generator=generator)[own] - 1)
    steps = torch.randint(-shift, shift + 1, (whole, 2), generator=generator)[own]
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = centre + 2 * steps / torch.tensor([width, height])
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    grid = grid.to(pixels.device, pixels.dtype)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False).clamp(
        0, 1
    )
