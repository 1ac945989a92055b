"""Sections of bench/gpu.py: decoding photos, and encoding them without gradient."""

import io
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_bench import Bench
from gpu_training import settings_of


def photos(bench: Bench) -> list[bytes]:
    """JPEG files with the statistics of photos: noise at several scales."""
    height, width = bench.sizes.photo
    rng, files = np.random.default_rng(0), []
    for _ in range(16):
        layers = [
            Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for scale in (4, 16, 64)
        ]
        mixed = sum(np.asarray(layer, dtype=np.float32) for layer in layers) / len(layers)
        file = io.BytesIO()
        Image.fromarray(mixed.astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


class Photos:
    """Work items of a loader: squares cut from photos, as training and evaluation read them."""

    def __init__(self, files: Sequence[bytes], items: int, size: int, resize: str) -> None:
        self.files, self.items, self.size, self.resize = files, items, size, resize

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> torch.Tensor:
        from flame.data.pixels import decode, square

        least = self.size if self.resize == "fast" else None
        images = [decode(self.files[n % len(self.files)], least) for n in range(64)]
        squares = [torch.tensor(square(image, self.size, self.resize)) for image in images]
        return torch.stack(squares).permute(0, 3, 1, 2)


def loader(bench: Bench) -> None:
    """Photos decoded and cut per second, by the number of worker processes."""
    from torch.utils.data import DataLoader

    sizes = bench.sizes
    files = photos(bench)
    cores = [workers for workers in sizes.workers if workers <= (os.cpu_count() or 1)]
    for workers, resize in [*((number, "fit") for number in cores), (cores[-1], "fast")]:
        items = workers * max(2, sizes.images // 64 // 4)
        dataset = Photos(files, items + workers, sizes.image_size, resize)
        batches = iter(
            DataLoader(
                dataset, batch_size=None, num_workers=workers, multiprocessing_context="forkserver"
            )
        )
        for _ in range(workers):  # all of them have started
            next(batches)
        start = time.perf_counter()
        read = sum(len(batch) for batch in batches)
        rate = read / (time.perf_counter() - start)
        bench.add(f"{workers} workers, {resize}", rate, "images/s", per_worker=rate / workers)


def evaluate(bench: Bench) -> None:
    """Images through a tower without gradient, as `flame.evaluate` encodes them."""
    from flame.evaluation.forward import image_features
    from flame.towers.load import create

    sizes = bench.sizes
    settings = settings_of(sizes, "flame", sizes.backbone, sizes.batch, "auto")
    tower = create(settings, sizes.width).to(bench.device).eval()
    side = sizes.image_size
    images = torch.randint(0, 256, (sizes.batch, 3, side, side), dtype=torch.uint8)
    if bench.device.type == "cuda":
        images = images.pin_memory()
    batches = [images] * 4

    def encode(precision: Any) -> None:
        image_features([tower.encode_image], batches, 4 * sizes.batch, bench.device, precision)

    for precision in ("float32", "bfloat16"):
        seconds = bench.seconds(lambda precision=precision: encode(precision))
        bench.add(precision, 4 * sizes.batch / seconds, "images/s", batch=sizes.batch)
