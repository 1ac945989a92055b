"""Random crops of the images of a batch: drawn on the CPU, made where the images are.

Shapes: B images, H x W pixels.
"""

import torch
from torch.nn import functional


def draw_crops(
    batch: int,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    shift: int,
    rank: int = 0,
    processes: int = 1,
) -> torch.Tensor | None:
    """Draw a random crop and a random shift of each image of a batch.

    There is no flip, because captions name left and right.

    Args:
        batch: B.
        size: H, W.
        generator: on the CPU, so that every device sees the same draws.
        scale: smallest and largest share of the area that a crop keeps, in (0, 1].
        shift: largest shift along each axis in pixels.
        rank: share of a larger batch that the images are: every `processes`-th, starting here.
        processes: number of shares. Each draws for the whole batch, so that an image is augmented
            in the same way whichever process has it.

    Returns:
        (B, 3) on the CPU: side of each crop as a share of the image's, and x and y of its centre
        in [-1, 1]; None if no image changes.
    """
    if scale == (1, 1) and shift == 0:
        return None
    whole, own = batch * processes, slice(rank, None, processes)
    low, high = scale
    side = (low + (high - low) * torch.rand(whole, generator=generator)[own, None]).sqrt()
    centre = (1 - side) * (2 * torch.rand(whole, 2, generator=generator)[own] - 1)
    steps = torch.randint(-shift, shift + 1, (whole, 2), generator=generator)[own]
    height, width = size
    return torch.cat([side, centre + 2 * steps / torch.tensor([width, height])], dim=1)


def crop(images: torch.Tensor, crops: torch.Tensor | None) -> torch.Tensor:
    """Crop images and resize them back, bilinear; beyond the edge, the edge is repeated.

    Args:
        images: (B, 3, H, W) uint8 in 0..255 or float in [0, 1].
        crops: (B, 3) of `draw_crops`, on the device of the images.

    Returns:
        (B, 3, H, W) float in [0, 1], on the same device.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    if crops is None:
        return pixels
    side, x, y = crops.to(pixels.dtype)[:, :, None].unbind(dim=1)
    # These are the numbers of affine_grid, whose matrix product TF32 would make less exact.
    x, y = (side * _centres(n, pixels) + c for n, c in ((pixels.shape[3], x), (pixels.shape[2], y)))
    columns, rows = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
    grid = torch.stack([columns, rows], dim=-1)
    cropped = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return cropped.clamp_(0, 1)


def _centres(pixels: int, like: torch.Tensor) -> torch.Tensor:
    """Places of the centres of a row of pixels in [-1, 1]."""
    edges = torch.linspace(-1, 1, pixels, device=like.device, dtype=like.dtype)
    return edges * (pixels - 1) / pixels
