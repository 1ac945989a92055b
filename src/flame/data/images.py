"""Images of a data set as arrays: read by byte offset, made square.

Shapes: B images, S pixels.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch

from flame.data.reading import INDEX, MORE, Places, Squares
from flame.runtime.checksums import verified


class ImageReader:
    """Random access to the images of a data set folder; row i is row i of its index.

    Attributes:
        keys: key of every image.
        drawings: images of each key: the one of the index, and further ones with the same captions.
    """

    def __init__(self, root: Path) -> None:
        index = pl.read_parquet(verified(root / INDEX))
        self.root = root
        self.keys = index["key"]
        self._labels = index["label"]
        self._places = [index[name].to_numpy() for name in ("shard", "offset", "size")]
        has_sums = "crc32c" in index.columns  # absent in data sets of older versions
        self._checksums = index["crc32c"].to_numpy() if has_sums else None
        self._more = self._further() if (root / MORE).exists() else None
        self.drawings = 1 if self._more is None else 1 + len(self._more[0]) // len(index)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def labels(self) -> list[str | None]:
        """Class of every image, None where there is none."""
        return self._labels.to_list()

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of sizes and checksums of all images, in their order; None without checksums."""
        if self._checksums is None:
            return None
        rows = np.stack([self._places[2], self._checksums], axis=1, dtype=np.int64)
        return hashlib.sha256(rows.tobytes()).hexdigest()

    def read(self, i: int) -> np.ndarray:
        """Image i as RGB pixels, (H, W, 3) uint8 in 0..255."""
        return np.asarray(self._of(np.array([i])).image(0))

    def load(
        self, indices: Sequence[int] | np.ndarray, size: int, resize: str = "fit"
    ) -> torch.Tensor:
        """Images cut to a square, read now; as by `request`.

        Returns:
            (B, 3, S, S) uint8 in 0..255.
        """
        return torch.from_numpy(self.request(np.asarray(indices), size, resize)())

    def request(
        self, indices: np.ndarray, size: int, resize: str = "fit", drawing: int = 0
    ) -> Squares:
        """A call that reads images and cuts them to a square, in this or another process.

        Args:
            indices: (B,) rows of the index.
            size: S; others are resized, bicubic.
            resize: how, a name of `flame.data.pixels.RESIZES`.
            drawing: which image of each key, in [0, drawings).
        """
        return Squares(self._of(indices, drawing), size, resize)

    def _of(self, rows: np.ndarray, drawing: int = 0) -> Places:
        places, checksums, at = self._places, self._checksums, rows
        if drawing:
            assert self._more is not None
            *places, checksums = self._more
            at = rows.astype(np.int64) * (self.drawings - 1) + drawing - 1
        shards, offsets, sizes = (values[at] for values in places)
        sums = None if checksums is None else checksums[at]
        return Places(self.root, rows, shards, offsets, sizes, sums)

    def _further(self) -> list[np.ndarray]:
        """Places and checksums of the further images, those of a key one after the other."""
        more = pl.read_parquet(verified(self.root / MORE))
        return [more[name].to_numpy() for name in ("shard", "offset", "size", "crc32c")]
