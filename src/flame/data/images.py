"""Images of a data set as tensors: read by byte offset, resized and augmented.

Shapes: B images, H x W pixels.
"""

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
import polars as pl
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from flame.data.shards import RANGELESS, ImageError, shard_path
from flame.runtime.checksums import verified


class ImageReader:
    """Random access to the images of a data set folder; row i is row i of its index.

    Holds no open file and can be pickled to the workers of a loader.

    Attributes:
        keys: key of every image.
        labels: class of every image, None where there is none.
    """

    def __init__(self, root: Path) -> None:
        index = pl.read_parquet(verified(root / "index.parquet"))
        self.root = root
        self.keys: list[str] = index["key"].to_list()
        self.labels: list[str | None] = index["label"].to_list()
        self._places = index.select("shard", "offset", "size").cast(pl.Int64).to_numpy()
        has_sums = "crc32c" in index.columns  # absent in data sets of older versions
        self._checksums = index["crc32c"].to_numpy() if has_sums else None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> np.ndarray:
        """Image i as RGB pixels, (H, W, 3) uint8 in 0..255."""
        return np.asarray(self._decode(i))

    def load(self, indices: Sequence[int], size: int, resize: str = "fit") -> torch.Tensor:
        """Images cut to a square.

        Args:
            indices: rows of the index.
            size: side in pixels; others are resized, bicubic.
            resize: how, a name of `RESIZES`.

        Returns:
            (B, 3, size, size) uint8 in 0..255.
        """
        squares = [square(self._decode(i), size, resize) for i in indices]
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, i: int) -> Image.Image:
        shard, offset, length = (int(value) for value in self._places[i])
        path = shard_path(self.root, shard)
        try:
            # pread does not move the file position, so forked workers can share an open file.
            data = os.pread(_open(path).fileno(), length, offset)
            if self._checksums is not None and google_crc32c.value(data) != self._checksums[i]:
                raise ValueError("the bytes differ from those that were written (CRC32C)")
            return to_rgb(Image.open(io.BytesIO(data)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ImageError(
                f"image {self.keys[i]!r} in {path} at byte {offset}: {error}"
            ) from error


@lru_cache(maxsize=256)  # open files, far below the usual limit of 1,024
def _open(path: Path) -> IO[bytes]:
    return path.open("rb", buffering=0)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB image from any mode; transparent pixels become white.

    Raises:
        ValueError: a mode of `RANGELESS`.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip all but the darkest 256 values to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in RANGELESS:
        raise ValueError(f"mode {image.mode!r} has no defined white level")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, size: int, resize: str = "fit") -> np.ndarray:
    """Pixels (size, size, 3) uint8 of an RGB image, made square by one of `RESIZES`."""
    return np.asarray(image if image.size == (size, size) else RESIZES[resize](image, size))


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size` and centre crop, in PIL's single step."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """The same in two steps with rounding in between, identical to open_clip."""
    shortest = min(image.size)
    width, height = (int(size * side / shortest) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _squash(image: Image.Image, size: int) -> Image.Image:
    """Both sides to `size`."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


RESIZES = {"fit": _fit, "crop": _crop, "squash": _squash}


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
