"""Crossmodal-3600: images from all over the world, captioned in 36 languages."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data import archives, web
from flame.data.datasets import Card, Sample
from flame.data.datasets._published import (
    Kind,
    Published,
    expected,
    image,
    images_in,
    sums_of,
)
from flame.data.json_objects import read_objects

CAPTIONS = "https://google.github.io/crossmodal-3600/web-data/captions.zip"
IMAGES = "https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz"

CARD = Card(
    title="Crossmodal-3600",
    source=f"{CAPTIONS} and {IMAGES}; no checksum is published, the manifest tells those of what "
    "came",
    licence="CC BY 4.0 (captions); of the images: in its attributions file, not verified",
    splits={"test": 3_600},
    texts="1 short caption per image in each of 36 languages",
    bytes=302_000_000,
    notes="Images have several captions per language; only the first is used, as in "
    "CLIP_benchmark. The averages in the figure are unweighted means over all 36 "
    "languages, English included. The prompt around the caption is English. The averages "
    "of CLIP's own ViT-B/16 under this protocol (7.37 image to text, 4.53 text to image) "
    "are those of Figure 4; those of mSigLIP are not (48.94 and 44.07; the figure has "
    "47.40 and 34.40).",
    used_in="Figure 4",
)


class Options(Published):
    """Which images of Crossmodal-3600, and the language of their captions."""

    split: Literal["test"] = "test"
    language: Literal[
        "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi",
        "hr", "hu", "id", "it", "ja", "ko", "mi", "nl", "no", "pl", "pt", "quz", "ro", "ru",
        "sv", "sw", "te", "th", "tr", "uk", "vi", "zh",
    ] = "en"  # fmt: skip
    kind: Kind = "short"
    """Caption kind; decides the prompt that they are embedded with. release: raw"""
    captions: str = CAPTIONS
    """Address of the captions."""
    captions_sha256: str | None = None
    images: str = IMAGES
    """Address of the images."""
    images_sha256: str | None = None


def size(options: Options) -> int:
    """Number of images."""
    return expected(CARD, options)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Images in the order of the captions.

    Args:
        root: folder for downloads, shared by all languages.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: a caption has no image.
    """
    archive = web.download(options.captions, root, options.captions_sha256)
    texts = archives.extract(archive, root / "captions") / "captions.jsonl"
    archive = web.download(options.images, root, options.images_sha256)
    folder = archives.extract(archive, root / "images")
    images = images_in(folder)
    for line in islice(read_objects(texts), options.limit):
        key = line["image/key"]
        first = line[options.language]["caption"][0]
        yield Sample(key, image(images, f"{key}.jpg", folder), {options.kind: [first]})


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: checksums of the downloads."""
    return sums_of(root, options.captions, options.images)
