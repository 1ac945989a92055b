"""Time to decode training images, part by part; memory and start of workers at many rows.

    python bench/loader.py
    python bench/loader.py --rows 15000000

The images are JPEGs of 512 x 683 pixels, made of smooth colours and noise. Parts and ways take
turns in one process, in CPU time, and the median is taken, because other work on the machine then
strikes all of them. With --rows, the index has that many rows, which all point to the same few
images, and a caption for each; two workers read a few batches, and are compared with empty ones.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl
import torch
from PIL import Image

from flame.data.datasets import Sample
from flame.data.images import ImageReader
from flame.data.pixels import decode, square
from flame.data.shards import ShardWriter
from flame.runtime.requests import Request
from flame.training.batches import WorkItem
from flame.training.loader import loader
from flame.training.pairs import Batches, Pairs

WIDTH, HEIGHT, SIZE = 512, 683, 224
IMAGES, BATCH, WORKERS = 16, 128, 2  # a batch is an item for each worker


def photo(draws: np.random.Generator) -> bytes:
    """A JPEG with the size in bytes of a photo."""
    colours = Image.fromarray(draws.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8))
    smooth = np.asarray(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    noisy = smooth + draws.normal(0, 8, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def photos(folder: Path) -> list[bytes]:
    """Write a data set of photos."""
    draws = np.random.default_rng(0)
    files = [photo(draws) for _ in range(IMAGES)]
    writer = ShardWriter(folder, samples_per_shard=IMAGES)
    for number, file in enumerate(files):
        writer.add(Sample(f"photo-{number}", file, {}))
    writer.close()
    return files


def parts_of(folder: Path, files: list[bytes], rounds: int) -> None:
    """Print the time of each part of reading an image, and of the whole."""
    reader, rows = ImageReader(folder), np.arange(IMAGES)
    images, halves = ([decode(file, least) for file in files] for least in (None, SIZE))
    ways: dict[str, Callable[[], object]] = {
        "whole, fit": reader.request(rows, SIZE, "fit"),
        "whole, fast": reader.request(rows, SIZE, "fast"),
        "CRC32C": _each(google_crc32c.value, files),
        "decode, fit": _each(decode, files),
        "decode, fast": _each(partial(decode, least=SIZE), files),
        "resize, fit": _each(partial(square, size=SIZE, resize="fit"), images),
        "resize, fast": _each(partial(square, size=SIZE, resize="fast"), halves),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append((time.process_time() - start) / IMAGES)
    size = sum(map(len, files)) / 1e3 / IMAGES
    print(f"{WIDTH} x {HEIGHT} JPEG, {size:.0f} kB, to {SIZE} pixels")
    print(f"{'part':14} {'ms/image':>9} {'images/s':>9} {'time / whole, fit':>18}")
    whole = statistics.median(seconds["whole, fit"])
    for name, times in seconds.items():
        found = statistics.median(times)
        print(f"{name:14} {found * 1e3:9.2f} {1 / found:9.0f} {found / whole:18.2f}")


def _each(function: Callable[[Any], object], values: list[Any]) -> Callable[[], object]:
    """A call of a function with each of some values; keeps no result."""
    return lambda: deque(map(function, values), maxlen=0)


def enlarge(folder: Path, rows: int) -> pl.Series:
    """Repeat the rows of an index under other keys, which are returned."""
    index = pl.read_parquet(folder / "index.parquet")
    keys = pl.select(pl.format("photo-{}", pl.int_range(rows))).to_series().alias("key")
    index[np.arange(rows) % len(index)].with_columns(keys).write_parquet(folder / "index.parquet")
    return keys


class Captions:
    """Texts with a key each; all the same, to save the time of writing a store."""

    def __init__(self, keys: pl.Series) -> None:
        self.keys = keys

    def request(self, indices: np.ndarray, facets: Sequence[str]) -> Request:
        """A call that makes texts."""
        return partial(np.zeros, (len(indices), len(facets), 8), np.float16)


def private_mb(process: int) -> float:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1e3


def memory_of_workers() -> float:
    """Largest private memory of the workers of a loader, MB."""
    return max(private_mb(child.pid) for child in active_children() if child.pid)


def empty_workers() -> tuple[float, float]:
    """Seconds until workers without data have read their first items, and their memory in MB."""
    start = time.perf_counter()
    with loader(Nothing(), workers=WORKERS) as ahead:
        next(iter(ahead))
        return time.perf_counter() - start, memory_of_workers()


class Nothing:
    """A schedule of empty batches."""

    facets, steps_per_epoch, local_batch_size, cached = [("", "")], 99, BATCH, False

    def __len__(self) -> int:
        return 99

    def item(self, step: int, rows: slice) -> WorkItem:
        """Zeros."""
        empty = partial(np.zeros, (rows.stop - rows.start, 1, 1, 1), np.uint8)
        return WorkItem(empty, (empty,))

    def columns(self, step: int) -> torch.Tensor:
        """One facet."""
        return torch.zeros(1)


def at_rows(folder: Path, rows: int) -> None:
    """Print memory and times of a training's input at many rows."""
    seconds, plain = empty_workers()
    captions = Captions(enlarge(folder, rows))
    before, start = private_mb(os.getpid()), time.perf_counter()
    stores, targets = {"long": captions}, {"long": ("scene",)}
    reader = ImageReader(folder)
    opened = time.perf_counter() - start
    pairs = Pairs(reader, stores, targets, image_size=SIZE, max_skipped=0)
    joined = time.perf_counter() - start - opened
    batches = Batches(pairs, batch_size=BATCH, epochs=1, seed=0)
    start = time.perf_counter()
    batches.item(0, slice(0, 1))
    drawn = time.perf_counter() - start
    start = time.perf_counter()
    with loader(batches, workers=WORKERS) as ahead:
        found = iter(ahead)
        next(found)
        first = time.perf_counter() - start
        for _ in range(4):
            next(found)
        used = memory_of_workers()
    print(f"{rows} rows, batches of {BATCH}, {WORKERS} workers")
    print(f"open the index {opened:.1f} s, join {joined:.1f} s, order of an epoch {drawn:.1f} s")
    print(f"first batch after {first:.1f} s, of workers without data {seconds:.1f} s")
    print(f"a worker {used:.0f} MB, without data {plain:.0f} MB")
    print(f"the main process {private_mb(os.getpid()) - before:.0f} MB more")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        files = photos(folder)
        if args.rows:
            at_rows(folder, args.rows)
        else:
            parts_of(folder, files, args.rounds)


if __name__ == "__main__":
    main()
