"""CIFAR-100: objects of 32 pixels a side."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, HubOptions

CARD = Card(
    title="CIFAR-100",
    source="hub: clip-benchmark/wds_vtab-cifar100 (webdataset)",
    licence="of the images: not verified",
    splits={"train": 45_000, "test": 10_000},
    texts="100 classes, 18 templates",
    notes="Training images by VTAB: the first 90 % of the training set. Class names are those of "
    "the repository (classnames.txt).",
    used_in="Tables 3, 5, 6, 7, C6 and C7",
)


class Options(HubOptions):
    """Which images of CIFAR-100."""

    id: str = "clip-benchmark/wds_vtab-cifar100"


_SET = Classification(CARD, templates="cifar100")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
