"""Images of a data set as tensors: read by byte offset, made square.

Shapes: B images, H x W pixels.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
import polars as pl
import torch
from PIL import Image

from flame.data.pixels import ImageError, decode, square
from flame.data.shards import shard_path
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
                raise ImageError("the bytes differ from those that were written (CRC32C)")
            return decode(data)
        except (OSError, ImageError) as error:
            raise ImageError(
                f"image {self.keys[i]!r} in {path} at byte {offset}: {error}"
            ) from error


@lru_cache(maxsize=256)  # open files, far below the usual limit of 1,024
def _open(path: Path) -> IO[bytes]:
    return path.open("rb", buffering=0)
