"""Oxford Flowers-102: species."""

from flame.data.datasets import Card
from flame.data.datasets._wds import Classification, OnlyTest

CARD = Card(
    title="Flowers-102",
    source="hub: clip-benchmark/wds_vtab-flowers (webdataset)",
    licence="of the images: not verified",
    splits={"test": 6_149},
    texts="102 classes, 1 template",
    used_in="Tables 3, 6, 7 and C6",
)


class Options(OnlyTest):
    """Which images of Flowers-102."""

    id: str = "clip-benchmark/wds_vtab-flowers"


_SET = Classification(CARD, templates="flowers", names="flowers")
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
