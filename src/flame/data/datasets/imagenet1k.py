"""ImageNet-1k, its validation images, with class names and templates in five languages."""

from pathlib import Path
from typing import Literal

from flame.data.datasets import Card
from flame.data.datasets._wds import (
    NAMES,
    TEMPLATES,
    Classification,
    OnlyTest,
    filled,
    numbered,
    packaged,
)

CARD = Card(
    title="ImageNet-1k",
    source="hub: clip-benchmark/wds_imagenet1k (webdataset)",
    licence="of the images: not verified; ImageNet itself wants a registration",
    splits={"test": 50_000},
    texts="1,000 classes; templates: 80 in English, 55 Arabic, 49 Italian, 37 Japanese, 80 Chinese",
    notes="Images of the validation split, which the repository calls test. `language` selects "
    "class names and templates of the package clip-benchmark; labels are always English. Two "
    "classes share a name in English (998 distinct; Arabic 996, Italian 980, Japanese 991, "
    "Chinese 999), so a label starts with its class number. The package calls Japanese jp and "
    "Chinese cn.",
    used_in="Tables 3, 4, 6, 7, C6 and C8",
)
LANGUAGES = {"en": "en", "ar": "ar", "it": "it", "ja": "jp", "zh": "cn"}


class Options(OnlyTest):
    """Which images of ImageNet-1k, and the language of the classes."""

    id: str = "clip-benchmark/wds_imagenet1k"
    language: Literal["en", "ar", "it", "ja", "zh"] = "en"
    """Language of the class texts."""


_SET = Classification(CARD, templates="imagenet1k", names="imagenet1k")
size, read, report = _SET.size, _SET.read, _SET.report


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Label -> every template of the language filled with the name of the class in it."""
    language = LANGUAGES[options.language]
    names = packaged(language, NAMES)["imagenet1k"]
    labels = numbered(_SET.class_names(root, options))
    return filled(labels, names, packaged(language, TEMPLATES)["imagenet1k"])
