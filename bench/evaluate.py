"""Speed of image features: decoded in turn and forwarded in float32, or by workers in bfloat16.

    python bench/evaluate.py --images 1024 --workers 15

Makes JPEGs of 512 x 683 pixels and prints, for each way, the images per second of the best of
several interleaved rounds. `decoding` and `forward` are the two halves alone; the first is on one
core. A GPU is used if there is one.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flame.data.datasets import Sample
from flame.data.images import ImageReader
from flame.data.shards import ShardWriter
from flame.evaluation.decoding import Decoder
from flame.evaluation.forward import image_features
from flame.runtime.device import device_of
from flame.study.schema.runs import Backbone, Recipe
from flame.towers.flame import FlameTower

RECIPE = Recipe(epochs=1, batch_size=8, lr=1e-3, weight_decay=0, warmup_steps=0)
DIM = 5120  # of Mistral-Nemo


def photographs(folder: Path, count: int) -> ImageReader:
    """Data set of smooth noise, which JPEG compresses about as much as photographs."""
    rng, writer = np.random.default_rng(0), ShardWriter(folder, samples_per_shard=256)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (64, 86, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((683, 512), Image.Resampling.BICUBIC)).astype(np.int16)
        image = (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=90)
        writer.add(Sample(f"{i}", data.getvalue(), {}))
    writer.close()
    return ImageReader(folder)


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best seconds of each way; the ways take turns, so that a busy machine slows all of them."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = device_of()
    tower = FlameTower(Backbone(timm=args.backbone, image_size=224), RECIPE, DIM).eval().to(device)
    with TemporaryDirectory() as folder:
        reader = photographs(Path(folder), args.images)
        rows, here, there = range(args.images), Decoder(), Decoder(args.workers)

        def decoded(decoder: Decoder) -> Iterator[Tensor]:
            return decoder.batches(reader, rows, 224, "fit", args.batch_size)

        forward = partial(image_features, [tower.encode_image], images=len(rows), device=device)
        ready = list(decoded(there))  # starts the workers, too
        list(forward(ready[:1], images=len(ready[0]), precision="bfloat16"))
        seconds = interleaved(
            {
                "decoding, in turn": lambda: list(decoded(here)),
                f"decoding, {args.workers} workers": lambda: list(decoded(there)),
                "forward, float32": lambda: forward(ready),
                "forward, bfloat16": lambda: forward(ready, precision="bfloat16"),
                "in turn, float32": lambda: forward(decoded(here)),
                "workers, bfloat16": lambda: forward(decoded(there), precision="bfloat16"),
            },
            args.rounds,
        )
    print(f"{args.images} images, {args.backbone}, {device}, batches of {args.batch_size}")
    print(f"{'':24}{'images/s':>10}{'x in turn':>10}")
    for name, spent in seconds.items():
        ratio = seconds["in turn, float32"] / spent
        print(f"{name:24}{args.images / spent:10.1f}{ratio:10.2f}")


if __name__ == "__main__":
    main()
