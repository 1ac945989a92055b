"""Winoground: two images and two captions with the same words in a different order."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl

from flame.data import archives, hub
from flame.data.datasets import Card, Sample
from flame.data.datasets._published import (
    OnHub,
    commit_of,
    expected,
    files_of,
    image,
    images_in,
)
from flame.data.json_objects import read_objects

EXAMPLES, IMAGES = "data/examples.jsonl", "data/images.zip"

CARD = Card(
    title="Winoground",
    source=f"hub: facebook/winoground ({EXAMPLES} and {IMAGES}, or Parquet files)",
    licence="for research only; images by Getty Images",
    splits={"test": 800},
    texts="1 caption per image (`positive`)",
    needs="HF_TOKEN of an account that accepted the conditions of the hub's facebook/winoground",
    notes="400 groups of two images, with keys `<id>-0` and `<id>-1`; an odd `limit` leaves a "
    "group of one, which is ignored. Groups are scored as in CLIP_benchmark: of equal scores the "
    "first one wins. The paper's Image, Text and Both are image score, text score and group "
    "score.",
    used_in="Table C3",
)


class Options(OnHub):
    """Which images of Winoground."""

    id: str = "facebook/winoground"
    split: Literal["test"] = "test"


def size(options: Options) -> int:
    """Number of images, two per group."""
    return expected(CARD, options)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Images group by group.

    Args:
        root: folder for downloads.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: the token has no access, or a caption has no image.
    """
    names = hub.list_files(options.id, options.revision, root / "hub")
    tables = sorted(name for name in names if name.endswith(".parquet"))
    groups = _of_tables(root, options, tables) if tables else _of_archive(root, options)
    samples = (
        Sample(f"{group['id']}-{n}", group[f"image_{n}"], {"positive": [group[f"caption_{n}"]]})
        for group in groups
        for n in (0, 1)
    )
    yield from islice(samples, options.limit)


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: the commit."""
    return commit_of(root)


def _of_tables(root: Path, options: Options, tables: list[str]) -> Iterator[dict[str, Any]]:
    """Groups in Parquet files, which contain the encoded images."""
    folder = files_of(options, root, *tables)
    for name in tables:
        for row in pl.read_parquet(folder / name).iter_rows(named=True):
            yield row | {place: row[place]["bytes"] for place in ("image_0", "image_1")}


def _of_archive(root: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Groups in JSON lines, which name images of a zip without their extension."""
    folder = files_of(options, root, EXAMPLES, IMAGES)
    unpacked = archives.extract(folder / IMAGES, root / "images")
    images = images_in(unpacked)
    whole = {Path(name).stem: name for name in images}
    for group in read_objects(folder / EXAMPLES):
        for place in ("image_0", "image_1"):
            name = whole.get(Path(group[place]).stem, group[place])
            group[place] = image(images, name, unpacked)
        yield group
