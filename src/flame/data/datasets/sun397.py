"""SUN397: scenes."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, OnlyTest

CARD = Card(
    title="SUN397",
    source="hub: clip-benchmark/wds_sun397 (webdataset)",
    licence="of the images: not verified",
    splits={"test": 108_754},
    texts="397 classes, 2 templates",
    notes="All images, as torchvision has no split; the LaCLIP and DreamLIP line of work tests on "
    "19,850 of them. Class names are those of the repository (classnames.txt): "
    "torchvision's, with spaces for underscores and slashes.",
    used_in="Tables 3, 6, 7 and C6",
)


class Options(OnlyTest):
    """Which images of SUN397."""

    id: str = "clip-benchmark/wds_sun397"


_SET = Classification(CARD, templates="sun397")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
