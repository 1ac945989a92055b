"""FGVC Aircraft: variants of aeroplanes."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, HubOptions

CARD = Card(
    title="FGVC Aircraft",
    source="hub: clip-benchmark/wds_fgvc_aircraft (webdataset)",
    licence="of the images: not verified",
    splits={"train": 3_334, "test": 3_333},
    texts="100 classes (variants), 2 templates",
    notes="Training images are those of train, without val. Class names are those of the "
    "repository (classnames.txt).",
    used_in="Tables 3, 5, 6, 7, C6 and C7",
)


class Options(HubOptions):
    """Which images of FGVC Aircraft."""

    id: str = "clip-benchmark/wds_fgvc_aircraft"


_SET = Classification(CARD, templates="fgvc_aircraft")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
