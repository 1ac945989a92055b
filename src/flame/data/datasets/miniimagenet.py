"""MiniImageNet: images of a hundred classes of ImageNet, for few-shot classification."""

import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import Literal

from flame.data import archives
from flame.data.datasets import Card, Sample
from flame.data.datasets._published import Published, expected, images_in

LAYOUT = (
    "files that start with the WordNet id of their class (n0153282900000005.jpg), or are in a "
    "folder of that name"
)

CARD = Card(
    title="MiniImageNet",
    source="no address: its images are placed by hand",
    licence="not verified; ImageNet itself wants a registration",
    splits={"all": 60_000},
    needs=f"images, under resources/raw/miniimagenet/images: {LAYOUT}",
    notes="60,000 images of 100 classes; the number is not verified, a different one is only a "
    "warning. A label is the first name in ImageNet, with underscores (house_finch), as in "
    "the release, whose class 27 has an empty name by mistake. The episodes of the release "
    "are files of V2L-Tokenizer, whose number is not verified; ours are sampled from a seed. "
    "Images alternate between classes, so that a `limit` keeps all classes.",
    used_in="Table C5, Figure C1",
)
WORDNET_ID = re.compile(r"n\d{8}")


class Options(Published):
    """Which images of MiniImageNet."""

    split: Literal["all"] = "all"
    images: str | None = None
    """Folder with the images; null: `images` in the folder of this source."""


def size(options: Options) -> int:
    """Number of images."""
    return expected(CARD, options)


def exact(options: Options) -> bool:
    """False: the images are placed by hand, so their number is not known."""
    return False


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the few-shot task uses the labels themselves."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Images, alternating between the classes.

    Args:
        root: folder of this source.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: the folder is missing, or an image belongs to no class of ImageNet.
    """
    folder = Path(options.images) if options.images else root / "images"
    archives.placed(folder.parent, [folder.name], f"it holds the images, {LAYOUT}")
    names = class_names()
    of_class: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in images_in(folder).values():
        own = WORDNET_ID.match(path.name)
        found = own or WORDNET_ID.fullmatch(path.parent.name)
        if found is None or found[0] not in names:
            raise ValueError(
                f"{path}: neither the file nor its folder starts with the WordNet id of a class"
            )
        stem = path.stem.replace(".", "_")
        of_class[found[0]].append((stem if own else f"{found[0]}_{stem}", path))
    turns = zip_longest(*(of_class[wordnet_id] for wordnet_id in sorted(of_class)))
    for key, path in islice((each for turn in turns for each in turn if each), options.limit):
        yield Sample(key, path.read_bytes(), {}, names[key[:9]])


def class_names() -> dict[str, str]:
    """WordNet id -> first name, of the 1,000 classes of ImageNet, as timm lists them."""
    # Located without an import, which would load torch.
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data" / "_info"
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    lemmas = dict(line.split("\t") for line in lines)
    chosen = (folder / "imagenet_synsets.txt").read_text("utf-8").split()
    return {each: lemmas[each].split(",")[0].replace(" ", "_") for each in chosen}
