"""Encoded images -> RGB pixels -> squares of a fixed size.

Needs no polars, and torch only for the resize `fast`.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps

RANGELESS = ("I", "F")  # modes without a defined black and white level


class ImageError(ValueError):
    """An image that cannot be read."""


def decode(data: bytes, least: int | None = None) -> Image.Image:
    """RGB image of the bytes of a PNG or JPEG file.

    Args:
        data: the bytes.
        least: smallest side that the image needs, in pixels: a JPEG is decoded at the smallest of
            1, 1/2, 1/4 and 1/8 of its size that has it, which takes less time. In full by default.

    Raises:
        ImageError: they are not an image, or one of a mode of `RANGELESS`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if least:
            image.draft(None, (least, least))
        image.load()
        return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB image from any mode; transparent pixels become white.

    Raises:
        ValueError: a mode of `RANGELESS`.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip all but the darkest 256 values to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in RANGELESS:
        raise ValueError(f"mode {image.mode!r} has no defined white level")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


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


def _fast(image: Image.Image, size: int) -> np.ndarray:
    """As `_fit`, but by torch, several times faster.

    It rounds the crop to whole pixels of the image, and a few values otherwise.
    """
    import torch  # takes seconds, and downloads need none
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image))
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = pixels[top : top + side, left : left + side].permute(2, 0, 1)[None]
    found = interpolate(crop, (size, size), mode="bicubic", antialias=True)
    return found[0].permute(1, 2, 0).numpy()


RESIZES: dict[str, Callable[[Image.Image, int], Image.Image | np.ndarray]] = {
    "fit": _fit,
    "crop": _crop,
    "squash": _squash,
    "fast": _fast,
}
