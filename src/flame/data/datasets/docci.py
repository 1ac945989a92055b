"""DOCCI: long descriptions of connected and contrasting images."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data import archives, web
from flame.data.datasets import Card, Sample
from flame.data.datasets._published import Published, expected, image, images_in, sums_of
from flame.data.json_objects import read_objects

ADDRESS = "https://storage.googleapis.com/docci/data"

CARD = Card(
    title="DOCCI",
    source=f"{ADDRESS}/docci_descriptions.jsonlines and docci_images.tar.gz; no checksum is "
    "published, the manifest tells those of what came",
    licence="CC BY 4.0 (annotations and images)",
    splits={"test": 5_000},
    texts="1 long caption per image, 136 words on average",
    bytes=7_110_500_000,
    notes="Entries of the split test; newlines in a description become spaces. 5,000 is the "
    "number in the paper; the download is checked against it.",
    used_in="Table C4",
)


class Options(Published):
    """Which images of DOCCI."""

    split: Literal["test"] = "test"
    descriptions: str = f"{ADDRESS}/docci_descriptions.jsonlines"
    """Address of the texts."""
    descriptions_sha256: str | None = None
    images: str = f"{ADDRESS}/docci_images.tar.gz"
    """Address of the images."""
    images_sha256: str | None = None


def size(options: Options) -> int:
    """Number of images."""
    return expected(CARD, options)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Images in the order of the descriptions.

    Args:
        root: folder for downloads.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: a description has no image.
    """
    texts = web.download(options.descriptions, root, options.descriptions_sha256)
    archive = web.download(options.images, root, options.images_sha256)
    folder = archives.extract(archive, root / "images")
    images = images_in(folder)
    chosen = (line for line in read_objects(texts) if line["split"] == options.split)
    for line in islice(chosen, options.limit):
        text = line["description"].replace("\n", " ")
        encoded = image(images, line["image_file"], folder)
        yield Sample(line["example_id"], encoded, {"long": [text]})


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: checksums of the downloads."""
    return sums_of(root, options.descriptions, options.images)
