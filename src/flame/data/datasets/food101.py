"""Food-101: dishes."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, HubOptions

CARD = Card(
    title="Food-101",
    source="hub: clip-benchmark/wds_food101 (webdataset)",
    licence="of the images: not verified",
    splits={"train": 75_750, "test": 25_250},
    texts="101 classes, 1 template",
    notes="Class names are those of the repository (classnames.txt): torchvision's, with spaces "
    "for underscores. CLIP_benchmark's list of hub sets lacks it, though the repository is there.",
    used_in="Tables 3, 5, 6, 7, C6 and C7",
)


class Options(HubOptions):
    """Which images of Food-101."""

    id: str = "clip-benchmark/wds_food101"


_SET = Classification(CARD, templates="food101")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
