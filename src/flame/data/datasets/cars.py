"""Stanford Cars: makes and models."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, HubOptions

CARD = Card(
    title="Stanford Cars",
    source="hub: clip-benchmark/wds_cars (webdataset)",
    licence="of the images: not verified",
    splits={"train": 8_144, "test": 8_041},
    texts="196 classes, 8 templates",
    notes="Class names are those of the repository (classnames.txt).",
    used_in="Tables 3, 5, 6, 7, C6 and C7",
)


class Options(HubOptions):
    """Which images of Stanford Cars."""

    id: str = "clip-benchmark/wds_cars"


_SET = Classification(CARD, templates="cars")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
