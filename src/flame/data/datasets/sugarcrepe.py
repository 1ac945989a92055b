"""SugarCrepe: a true caption and a hard negative that differs by a small edit."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data import archives, web
from flame.data.datasets import Card, Sample
from flame.data.datasets._published import Published, expected, image, images_in, sums_of

COMMIT = "0047054b243992f0fad63d6f64f7544862daf846"
IMAGES = "http://images.cocodataset.org/zips/val2017.zip"

CARD = Card(
    title="SugarCrepe",
    source=f"data/*.json of RAIVNLab/sugar-crepe at {COMMIT[:7]}, and {IMAGES}; no checksum is "
    "published, the manifest tells those of what came",
    licence="MIT (captions); of the images: not verified",
    splits={
        "add_att": 692,
        "add_obj": 2_062,
        "replace_att": 788,
        "replace_obj": 1_652,
        "replace_rel": 1_406,
        "swap_att": 666,
        "swap_obj": 245,
    },
    texts="1 true caption per image (`positive`) and 1 false one (`negative`)",
    notes="7,511 entries on images of COCO val2017; an image with several entries is stored once "
    "for each. The true caption has to score higher; a tie counts as correct, as in "
    "CLIP_benchmark but not in SugarCrepe's own code.",
    used_in="Table C3",
)


class Options(Published):
    """Which entries of SugarCrepe."""

    split: Literal[
        "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"
    ] = "add_att"
    """Kind of edit."""
    data: str = f"https://raw.githubusercontent.com/RAIVNLab/sugar-crepe/{COMMIT}/data"
    """Address of the folder of the captions."""
    images: str = IMAGES
    """Address of the images."""
    images_sha256: str | None = None


def size(options: Options) -> int:
    """Number of entries, each with an image."""
    return expected(CARD, options)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Entries in the order of their file; their numbers in it may have gaps.

    Args:
        root: folder in which what is fetched is kept; the same for every edit.
        options: which entries.
        seed: unused; nothing is random.

    Raises:
        ValueError: an entry has no image.
    """
    entries = web.download(_address(options), root)
    archive = web.download(options.images, root, options.images_sha256)
    folder = archives.extract(archive, root / "images")
    images = images_in(folder)
    for number, entry in islice(json.loads(entries.read_text("utf-8")).items(), options.limit):
        captions = {"positive": [entry["caption"]], "negative": [entry["negative_caption"]]}
        encoded = image(images, entry["filename"], folder)
        yield Sample(f"{options.split}-{number}", encoded, captions)


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: checksums of the downloads."""
    return sums_of(root, _address(options), options.images)


def _address(options: Options) -> str:
    return f"{options.data}/{options.split}.json"
