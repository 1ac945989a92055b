"""Samples -> WebDataset tar shards with an index by byte offset, and tables of what is known."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import polars as pl
from PIL import Image

from flame.data import attributes, captions
from flame.data.datasets import Sample
from flame.data.pixels import ImageError
from flame.data.reading import INDEX, MORE, shard_path

COLUMNS = {
    "key": pl.String,
    "shard": pl.Int32,
    "offset": pl.Int64,
    "size": pl.Int64,
    "width": pl.Int32,
    "height": pl.Int32,
    "label": pl.String,
    "crc32c": pl.UInt32,
}
EXTENSIONS = {"PNG": "png", "JPEG": "jpg"}


class ShardWriter:
    """Writes one data set, deterministically.

    Args:
        root: folder of the data set; made if missing.
        samples_per_shard: images in every shard but the last; held in memory until written.
    """

    def __init__(self, root: Path, samples_per_shard: int) -> None:
        self.root = root
        self.samples_per_shard = samples_per_shard
        self._keys: set[str] = set()
        self._pending: list[tuple[str, bytes]] = []
        self._samples = 0  # of those that are pending
        self._offsets: list[tuple[int, int]] = []
        self._index: list[tuple[str, int, int, int, str | None, int]] = []
        self._more: int | None = None  # further images of every sample
        self._captions: list[tuple[str, str, str, str]] = []
        self._attributes: list[tuple[str, Mapping[str, str | None]]] = []
        self._num_shards = 0
        root.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample) -> None:
        """Append an image, further images of it, and their captions.

        Raises:
            ImageError: an image is not a PNG or JPEG. Nothing was written; others may follow.
        """
        if sample.key in self._keys or "." in sample.key or "/" in sample.key:
            raise ValueError(f"key {sample.key!r} is a duplicate or contains '.' or '/'")
        if self._more not in (None, len(sample.more)):
            raise ValueError(
                f"{sample.key!r} has {len(sample.more)} further images, others {self._more}"
            )
        images = (sample.image, *sample.more)
        headers = [_header(sample.key, image) for image in images]
        self._more = len(sample.more)
        self._keys.add(sample.key)
        for number, (image, header) in enumerate(zip(images, headers, strict=True)):
            extension, width, height = header
            name = f"{sample.key}.{number}" if number else sample.key
            self._pending.append((f"{name}.{extension}", image))
            checksum = google_crc32c.value(image)
            self._index.append((sample.key, len(image), width, height, sample.label, checksum))
        self._samples += 1
        self._captions += [
            (sample.key, kind, text, "")
            for kind, texts in sample.captions.items()
            for text in texts
        ]
        if sample.attributes:
            self._attributes.append((sample.key, sample.attributes))
        if self._samples == self.samples_per_shard:
            self._write_shard()

    def add_classes(self, classes: dict[str, list[str]]) -> None:
        """Append class texts (label -> filled templates) as captions of the kind `class`."""
        self._captions += [
            (label, "class", text, "") for label, texts in classes.items() for text in texts
        ]

    def close(self) -> dict[str, int]:
        """Write the last shard, `index.parquet`, `captions.parquet`, and attributes if known.

        Samples with further images also get `more.parquet`, with the columns of the index and as
        many rows for each sample, in the same order.

        Returns:
            Number of images, captions (including class texts) and shards.
        """
        if self._pending:
            self._write_shard()
        rows = [
            (key, *place, *others)
            for (key, *others), place in zip(self._index, self._offsets, strict=True)
        ]
        frame = pl.DataFrame(rows, schema=COLUMNS, orient="row")
        is_first = pl.int_range(pl.len()) % (1 + (self._more or 0)) == 0
        index = frame.filter(is_first)
        index.write_parquet(self.root / INDEX)
        if self._more:
            frame.filter(~is_first).write_parquet(self.root / MORE)
        texts = captions.table(self._captions)
        texts.write_parquet(self.root / captions.FILE, row_group_size=captions.ROW_GROUP)
        if self._attributes:
            attributes.write(self.root, self._attributes)
        return {"images": len(index), "captions": len(texts), "shards": self._num_shards}

    def _write_shard(self) -> None:
        with tarfile.open(shard_path(self.root, self._num_shards), "w") as tar:
            for name, data in self._pending:
                # TarInfo's defaults (time 0, user 0) make the bytes reproducible.
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                # Counted from the end, as a long name takes several blocks before the data.
                blocks = -(-len(data) // tarfile.BLOCKSIZE)
                self._offsets.append((self._num_shards, tar.offset - blocks * tarfile.BLOCKSIZE))
        self._num_shards += 1
        self._pending.clear()
        self._samples = 0


def _header(key: str, data: bytes) -> tuple[str, int, int]:
    """File extension, width and height in pixels (as stored, before any EXIF rotation)."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)) as image:
            return EXTENSIONS[str(image.format)], image.width, image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {key!r} is not a readable PNG or JPEG: {error}") from error
