"""Images read by their place in the shards of a data set, in any process. Needs no polars.

Shapes: n images, S pixels.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
from PIL import Image

from flame.data.pixels import ImageError, decode, square

INDEX = "index.parquet"
MORE = "more.parquet"  # places of further images of each sample


def shard_path(root: Path, shard: int) -> Path:
    """Path of a shard by number."""
    return root / f"shard-{shard:05d}.tar"


@dataclass(frozen=True)
class Places:
    """Where some images of a data set folder lie.

    Attributes:
        root: the folder.
        rows: (n,) numbers of the images in its index.
        shards: (n,) numbers of the shards.
        offsets: (n,) places of the first byte.
        sizes: (n,) bytes.
        checksums: (n,) CRC32C of the bytes; None in data sets of older versions.
    """

    root: Path
    rows: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray | None

    def image(self, i: int, least: int | None = None) -> Image.Image:
        """Image number i of these, RGB; `least` as in `flame.data.pixels.decode`.

        Raises:
            ImageError: it cannot be read; the message has its key.
        """
        path, offset = shard_path(self.root, int(self.shards[i])), int(self.offsets[i])
        try:
            # pread does not move the file position, so forked workers can share an open file.
            data = os.pread(_open(path).fileno(), int(self.sizes[i]), offset)
            if self.checksums is not None and google_crc32c.value(data) != self.checksums[i]:
                raise ImageError("the bytes differ from those that were written (CRC32C)")
            return decode(data, least)
        except (OSError, ImageError) as error:
            key = _key(self.root, int(self.rows[i]))
            raise ImageError(f"image {key!r} in {path} at byte {offset}: {error}") from error


@dataclass(frozen=True)
class Squares:
    """Call that reads images and cuts them to squares.

    Attributes:
        places: of the images.
        size: side in pixels; others are resized, bicubic.
        resize: how, a name of `flame.data.pixels.RESIZES`; for `fast`, JPEGs are decoded no larger
            than needed.
    """

    places: Places
    size: int
    resize: str

    def __call__(self) -> np.ndarray:
        """(n, 3, size, size) uint8 in 0..255."""
        out = np.empty((len(self.places.rows), 3, self.size, self.size), np.uint8)
        least = self.size if self.resize == "fast" else None
        for i, pixels in enumerate(out):
            found = square(self.places.image(i, least), self.size, self.resize)
            pixels[:] = found.transpose(2, 0, 1)
        return out


@lru_cache(maxsize=256)  # open files, far below the usual limit of 1,024
def _open(path: Path) -> IO[bytes]:
    return path.open("rb", buffering=0)


def _key(root: Path, row: int) -> str:
    """Key of an image, read from the index, for errors."""
    import polars as pl  # only here, as the workers of a loader never need it otherwise

    return str(pl.scan_parquet(root / INDEX).slice(row, 1).select("key").collect().item())
