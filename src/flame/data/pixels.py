"""Encoded images -> RGB pixels -> squares of a fixed size. Needs neither torch nor polars."""

import io

import numpy as np
from PIL import Image, ImageOps

RANGELESS = ("I", "F")  # modes without a defined black and white level


class ImageError(ValueError):
    """An image that cannot be read."""


def decode(data: bytes) -> Image.Image:
    """RGB image of the bytes of a PNG or JPEG file.

    Raises:
        ImageError: they are not an image, or one of a mode of `RANGELESS`.
    """
    try:
        return to_rgb(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(str(error)) from error


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
