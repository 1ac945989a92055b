"""Time to decode training images, part by part; memory and start of workers at many rows.

    python bench/loader.py
    python bench/loader.py --rows 15000000

The images are JPEGs of 512 x 683 pixels, made of smooth colours and noise. Parts and ways take
turns in one process, in CPU time, and the median is taken, because other work on the machine then
strikes all of them. With --rows, the index and a store of embeddings have that many rows, which all
point to the same few images; two workers read a few batches, and are compared with an empty one.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flame.data.datasets import Sample
from flame.data.images import ImageReader
from flame.data.pixels import decode, square
from flame.data.shards import ShardWriter
from flame.embedding import store
from flame.training.loader import loader
from flame.training.pairs import Batches, Pairs

WIDTH, HEIGHT, SIZE = 512, 683, 224
IMAGES, BATCH, WORKERS = 16, 512, 2


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


def embeddings_of(path: Path, keys: pl.Series) -> store.Embeddings:
    """A store with a row for each key."""
    store.SHARD_ROWS = 1 << 16  # fewer files, to save time
    store.create(path, {"kind": "long", "facets": {"scene": ""}, "part": 0, "parts": 1})
    writer = store.Writer(path, "photos", keys=keys, facets=["scene"], dim=8)
    for rows in writer.missing():
        writer.write(rows, np.ones((len(rows), 1, 8), np.float16))
    return store.Embeddings.open([path], "photos")


def private_mb(process: int) -> float:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1e3


def memory_of_workers() -> float:
    """Largest private memory of the workers of a loader, MB."""
    return max(private_mb(child.pid) for child in active_children() if child.pid)


def at_rows(folder: Path, rows: int) -> None:
    """Print memory and times of a training's input at many rows."""
    empty = iter(DataLoader(range(99), num_workers=1, multiprocessing_context="spawn"))
    next(empty)
    plain = memory_of_workers()
    del empty
    embeddings = embeddings_of(folder.with_name("0.zarr"), enlarge(folder, rows))
    before, start = private_mb(os.getpid()), time.perf_counter()
    stores, targets = {"long": embeddings}, {"long": ("scene",)}
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
    print(f"first batch {first:.1f} s after the start of the workers")
    print(f"a worker {used:.0f} MB, {used - plain:.0f} more than an empty one ({plain:.0f})")
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
