"""Time to read a training batch: our store, one .pth file an image, a plain memory map.

    python bench/store.py
    python bench/store.py --dim 5120 --rows 2000

The official FLAME release keeps one .pth file (K, d) for every image; a memory map
has no format at all. The three hold the same rows; batches are read from them in turn, and the
median is taken, because other work on the machine then strikes all three. Files come from the
page cache, so this measures the software, not the disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from flame.embedding import store

Reader = Callable[[np.ndarray], np.ndarray]


def write_store(folder: Path, vectors: np.ndarray) -> Reader:
    """Our store: Zarr shards."""
    facets = {f"facet {k}": "" for k in range(vectors.shape[1])}
    attributes = {"kind": "long", "facets": facets, "part": 0, "parts": 1}
    store.create(folder, attributes)
    writer = store.Writer(
        folder,
        "bench",
        keys=[str(i) for i in range(len(vectors))],
        facets=list(facets),
        dim=vectors.shape[2],
    )
    for rows in writer.missing():
        writer.write(rows, vectors[rows.start : rows.stop])
    return store.Embeddings.open([folder], "bench").rows


def write_pth(folder: Path, vectors: np.ndarray) -> Reader:
    """The release's layout: a .pth file an image, in folders of 10,000 as in its tar shards."""
    paths = [folder / f"{i // 10_000:05d}" / f"{i:09d}.pth" for i in range(len(vectors))]
    for path, row in zip(paths, vectors, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(row.copy()), path)
    return lambda indices: torch.stack([torch.load(paths[i]) for i in indices]).numpy()


def write_memmap(folder: Path, vectors: np.ndarray) -> Reader:
    """A plain array in one file, mapped into memory."""
    folder.mkdir()
    np.save(folder / "rows.npy", vectors)
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    return lambda indices: mapped[indices]


LAYOUTS = {"store": write_store, "pth": write_pth, "memmap": write_memmap}


def measure(
    readers: dict[str, Reader], batches: list[np.ndarray], vectors: np.ndarray
) -> dict[str, float]:
    """Median seconds for a batch by layout, the layouts taking turns; what is read is checked."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for batch in batches:
        for name, read in readers.items():
            start = time.perf_counter()
            rows = read(batch)
            seconds[name].append(time.perf_counter() - start)
            np.testing.assert_array_equal(rows, vectors[batch])
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Write the layouts, read from them, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--facets", type=int, default=11)
    parser.add_argument("--dim", type=int, default=576, help="5120 for Mistral-Nemo")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=30)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (args.rows, args.facets, args.dim)
    vectors = rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
    orders = {
        "random": [rng.permutation(args.rows)[: args.batch] for _ in range(args.batches)],
        "sequential": [
            np.arange(start, start + args.batch)
            for start in rng.integers(args.rows - args.batch, size=args.batches)
        ],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in LAYOUTS}
        readers = {name: write(folders[name], vectors) for name, write in LAYOUTS.items()}
        print(f"{args.rows} rows of {args.facets} x {args.dim} float16, batches of {args.batch}")
        print(f"{'layout':8} {'files':>6} {'MB':>8}")
        for name, folder in folders.items():
            # Blocks of 512 bytes, as allocated: what counts for many small files.
            stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
            print(f"{name:8} {len(stats):6} {sum(s.st_blocks for s in stats) * 512 / 1e6:8.1f}")
        print(f"{'order':12} {'layout':8} {'ms/batch':>9} {'rows/s':>9} {'time / store':>13}")
        for order, batches in orders.items():
            medians = measure(readers, batches, vectors)
            for name, seconds in medians.items():
                ratio = seconds / medians["store"]
                rate = args.batch / seconds
                print(f"{order:12} {name:8} {seconds * 1e3:9.2f} {rate:9.0f} {ratio:13.2f}")


if __name__ == "__main__":
    main()
