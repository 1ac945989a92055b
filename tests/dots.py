"""A data set of 24 random images with its embedding stores, and tiny trainings on it."""

import json
from io import BytesIO

import numpy as np
from PIL import Image

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import store
from flame.study.schema.runs import Recipe
from flame.study.settings import ClipTraining, FlameTraining, LongClipTraining
from flame.towers.base import Tower

FACETS = {"scene": " a", "object": " b"}
IMAGES, SIZE, DIM = 24, 16, 12


def png(rng):
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    data = BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write(root):
    """Folder of a data set with 24 images, and the stores of its raw and long captions."""
    rng = np.random.default_rng(0)
    images = root / "dots"
    writer = ShardWriter(images, samples_per_shard=10)
    keys = [f"dot-{i}" for i in range(IMAGES)]
    for key in keys:
        captions = {"raw": [f"dot {key}"], "long": [f"a picture of {key}"], "short": [f"a {key}"]}
        writer.add(Sample(key=key, image=png(rng), captions=captions))
    (images / "manifest.json").write_text(json.dumps(writer.close()))
    stores = []
    for kind in ("raw", "long"):
        path = root / "store" / kind / "0.zarr"
        attributes = {"kind": kind, "facets": FACETS, "part": 0, "parts": 1}
        store.create(path, attributes)
        rows = store.Writer(path, "dots", keys=keys[::-1], facets=list(FACETS), dim=DIM)
        rows.write(range(IMAGES), rng.normal(1.0, 1.0, (IMAGES, len(FACETS), DIM)))
        stores.append(path)
    return {"images": images, "stores": tuple(stores)}


def recipe_of(**changes):
    plain = {
        "epochs": 4,
        "batch_size": 8,
        "lr": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "standardize": "center",
        "precision": "float32",
        "augment": {"scale": (0.7, 1.0), "shift": 2},
    }
    return Recipe(**(plain | changes))


def shared(**recipe):
    args = {"channels": [8, 8, 16, 16], "stem_width": 4, "drop_path_rate": 0.1}
    return {
        "run": "tiny",
        "seed": 0,
        "dataset": "dots",
        "backbone": {"timm": "resnet10t", "image_size": SIZE, "args": args},
        "recipe": recipe_of(**recipe),
        "max_skipped": 0.0,
        "version": 1,
    }


def settings(**recipe):
    targets = {"raw": ("scene",), "long": ("scene", "object")}
    return FlameTraining(targets=targets, **shared(**recipe))


def clip_settings(**recipe):
    sizes = {"width": 16, "layers": 2, "heads": 2, "context_length": 12, "embed_dim": 8}
    return ClipTraining(method="clip", captions="raw", text_tower=sizes, **shared(**recipe))


def long_settings(**recipe):
    return LongClipTraining(
        method="long-clip",
        long="long",
        short="short",
        text_tower=clip_settings().text_tower,
        context_length=20,
        kept_positions=4,
        components=3,
        **shared(**({"tau": 0.01, "label_smoothing": 0.1} | recipe)),
    )


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def call_number(number, action):
    """Stand-in for `Tower.clamp_scale`, the end of a step, which acts at some call."""
    original, calls = Tower.clamp_scale, []

    def counting(*args):
        calls.append(args)
        return action() if len(calls) == number else original(*args)

    return counting
