"""DTD: describable textures."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, HubOptions

CARD = Card(
    title="DTD",
    source="hub: clip-benchmark/wds_vtab-dtd (webdataset)",
    licence="of the images: not verified",
    splits={"train": 1_880, "test": 1_880},
    texts="47 classes, 8 templates",
    notes="Fold 1 of ten, as in VTAB, train without val. The number of training images is that of "
    "the publisher's fold; the repository's own number is not verified. Class names are those "
    "of the repository (classnames.txt).",
    used_in="Tables 3, 5, 6, 7, C6 and C7",
)


class Options(HubOptions):
    """Which images of DTD."""

    id: str = "clip-benchmark/wds_vtab-dtd"


_SET = Classification(CARD, templates="dtd")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report


def exact(options: Options) -> bool:
    """Of the test images; how many the repository has for training is not verified."""
    return options.split == "test"
