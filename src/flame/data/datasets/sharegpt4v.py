"""ShareGPT4V: a million images with long captions, and its first thousand for validation."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data import archives
from flame.data.datasets import Card, Sample, Skipped
from flame.data.datasets._published import OnHub, commit_of, expected, files_of
from flame.data.json_objects import read_objects

VALIDATION = 1_000  # first entries of the list, by Long-CLIP
FOLDERS = {
    "llava/llava_pretrain/images": "images.zip of the hub's liuhaotian/LLaVA-Pretrain",
    "coco/train2017": "train2017 of COCO",
    "sam/images": "images of 000000.tar to 000050.tar of SA-1B, after accepting its licence",
}

CARD = Card(
    title="ShareGPT4V",
    source="hub: Lin-Chen/ShareGPT4V (share-captioner_coco_lcs_sam_1246k_1107.json)",
    licence="CC BY-NC 4.0 (captions); the images are those of LAION, CC, SBU, COCO and SA-1B",
    splits={"val": VALIDATION, "train": 1_246_000 - VALIDATION},
    texts="1 long caption per image; `short` is its first sentence",
    bytes=1_500_000_000,
    needs="images, in three folders under resources/raw/sharegpt4v/images: "
    + "; ".join(f"{folder} ({what})" for folder, what in FOLDERS.items()),
    notes="The captions are ShareCaptioner's, not GPT-4V's. The first 1,000 entries are "
    "ShareGPT4V-val, the others the training set of Long-CLIP, for which the benchmark is thus "
    "in-domain. Newlines in a caption become spaces; the short text ends before the first "
    "full stop followed by a space, as in Long-CLIP. 1,246 thousand is the publisher's rounded "
    "number. Which folders the first 1,000 need is not verified: the download names a folder that "
    "is missing.",
    used_in="Tables 1 and 6, Figure D2; training of the Long-CLIP rows",
)


class Options(OnHub):
    """Which images of ShareGPT4V."""

    id: str = "Lin-Chen/ShareGPT4V"
    file: str = "share-captioner_coco_lcs_sam_1246k_1107.json"
    """List of the captions in the repository."""
    split: Literal["val", "train"] = "val"
    images: str | None = None
    """Folder with the three folders of images; null: `images` in the folder of this source."""


def size(options: Options) -> int:
    """Number of images."""
    return expected(CARD, options)


def exact(options: Options) -> bool:
    """Whether `size` is exact: for training images only a rounded number was published."""
    return options.split == "val"


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the images have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample | Skipped]:
    """Images in the order of the list; keys are positions in it.

    Args:
        root: folder for downloads.
        options: which images.
        seed: unused; nothing is random.

    Raises:
        ValueError: a folder of images is missing.
    """
    images = Path(options.images) if options.images else root / "images"
    first, last = (0, VALIDATION) if options.split == "val" else (VALIDATION, None)
    items = enumerate(read_objects(files_of(options, root, options.file) / options.file))
    for number, item in islice(islice(items, first, last), options.limit):
        key = f"{number:07d}"
        path = images / item["image"]
        if path.is_file():
            yield Sample(key, path.read_bytes(), captions(item["conversations"][1]["value"]))
        else:
            _require_folder(images, item["image"])
            yield Skipped(key, f"no file {item['image']}")


def captions(text: str) -> dict[str, list[str]]:
    """The long caption, and the short one that Long-CLIP derives from it."""
    long = text.replace("\n", " ")
    return {"long": [long], "short": [long.split(". ")[0]]}


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: the commit."""
    return commit_of(root)


def _require_folder(images: Path, name: str) -> None:
    """Single images may be missing, but not a whole folder."""
    for folder, what in FOLDERS.items():
        if name.startswith(f"{folder}/"):
            archives.placed(images, [folder], f"it holds {what}")
            return
    archives.placed(images, [str(Path(name).parent)], "the list names images in it")
