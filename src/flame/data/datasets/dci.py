"""DCI, densely captioned images: long captions of images of SA-1B."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data import archives, web
from flame.data.datasets import Card, Sample, Skipped
from flame.data.datasets._published import Published, expected, sums_of

ADDRESS = "https://dl.fbaipublicfiles.com/densely_captioned_images/dci.tar.gz"
SHA256 = "d865c244150168d3f25daaad0bf5b70b2123cf3e83ca7b0e207d5b26943c5fc7"
PHOTOS = "the images of sa_000138.tar of SA-1B, after accepting its licence"

CARD = Card(
    title="DCI",
    source=f"{ADDRESS}, sha256 {SHA256} (download script of facebookresearch/DCI at 8326c97)",
    licence="CC BY-NC 4.0 (captions); the images are under the licence of SA-1B",
    splits={"all": 7_805, "test": 112},
    texts="1 long caption per image",
    needs=f"images, under resources/raw/dci/photos: {PHOTOS}",
    notes="The release evaluates on all entries of all splits of splits.json (7,805, the number "
    "in the paper), although DCI's own test split has 112. The caption is short_caption and "
    "extra_caption, split into sentences at newlines, `</s>` and full stops and joined by `. `, "
    "without a final full stop; mask captions are not used.",
    used_in="Table C4",
)
ENDS = re.compile(r"\n|</s>|[.]")


class Options(Published):
    """Which images of DCI."""

    url: str = ADDRESS
    sha256: str = SHA256
    """Checksum of the archive."""
    split: Literal["all", "test"] = "all"
    photos: str | None = None
    """Folder with the images; null: `photos` in the folder of this source."""


def size(options: Options) -> int:
    """Number of images."""
    return expected(CARD, options)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample | Skipped]:
    """Images in the order of splits.json.

    Args:
        root: folder for downloads.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: the folder of the images is missing.
    """
    photos = Path(options.photos) if options.photos else root / "photos"
    archives.placed(photos.parent, [photos.name], f"it holds {PHOTOS}")
    archive = web.download(options.url, root, options.sha256)
    folder = archives.extract(archive, root / "dci") / "densely_captioned_images"
    splits = json.loads((folder / "splits.json").read_text("utf-8"))
    chosen = splits.values() if options.split == "all" else [splits[options.split]]
    for name in islice((name for names in chosen for name in names), options.limit):
        entry = json.loads((folder / "annotations" / name).read_text("utf-8"))
        key, path = Path(name).stem, photos / entry["image"]
        if path.is_file():
            text = caption(entry["short_caption"], entry["extra_caption"])
            yield Sample(key, path.read_bytes(), {"long": [text]})
        else:
            yield Skipped(key, f"no file {entry['image']}")


def caption(short: str, extra: str) -> str:
    """The caption as the release builds it: sentences joined by ". "."""
    sentences = (sentence.strip() for sentence in ENDS.split(f"{short}\n{extra}"))
    return ". ".join(sentence for sentence in sentences if sentence)


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: checksum of the archive."""
    return sums_of(root, options.url)
