"""Oxford-IIIT Pets: breeds of cats and dogs."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, OnlyTest

CARD = Card(
    title="Oxford Pets",
    source="hub: clip-benchmark/wds_vtab-pets (webdataset)",
    licence="of the images: not verified",
    splits={"test": 3_669},
    texts="37 classes, 1 template",
    used_in="Tables 3, 6, 7 and C6",
)


class Options(OnlyTest):
    """Which images of Oxford Pets."""

    id: str = "clip-benchmark/wds_vtab-pets"


_SET = Classification(CARD, templates="pets", names="pets")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
