"""Urban-1k: long captions of busy streets."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data import archives
from flame.data.datasets import Card, Sample
from flame.data.datasets._published import (
    Kind,
    OnHub,
    commit_of,
    expected,
    files_of,
    image,
    images_in,
)

CARD = Card(
    title="Urban-1k",
    source="hub: BeichenZhang/Urban1k (Urban1k.zip)",
    licence="CC BY-NC 4.0",
    splits={"test": 1_000},
    texts="1 long caption per image",
    bytes=80_600_000,
    notes="Image and caption have the same file stem. Only the first line of a caption file is "
    "used, as in Long-CLIP and the release.",
    used_in="Tables 1 and 6",
)


class Options(OnHub):
    """Which images of Urban-1k."""

    id: str = "BeichenZhang/Urban1k"
    split: Literal["test"] = "test"
    kind: Kind = "long"
    """Caption kind; decides the prompt that they are embedded with."""


def size(options: Options) -> int:
    """Number of images."""
    return expected(CARD, options)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Images in the order of their names.

    Args:
        root: folder for downloads.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: a caption has no image.
    """
    archive = files_of(options, root, "Urban1k.zip") / "Urban1k.zip"
    folder = archives.extract(archive, root / "Urban1k")
    images = images_in(folder)
    named = {Path(name).stem: name for name in images}
    for path in islice(sorted(folder.rglob("caption/*.txt")), options.limit):
        lines = path.read_text("utf-8").splitlines()
        name = named.get(path.stem, f"{path.stem}.jpg")
        yield Sample(path.stem, image(images, name, folder), {options.kind: [lines[0].strip()]})


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: the commit."""
    return commit_of(root)
