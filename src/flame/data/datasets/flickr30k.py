"""Flickr30k, the test images of Karpathy's split."""

from flame.data.datasets import Card
from flame.data.datasets._wds import CaptionOptions, Retrieval

CARD = Card(
    title="Flickr30k",
    source="hub: clip-benchmark/wds_flickr30k (webdataset, test/{0..4}.tar)",
    licence="of the images: not verified",
    splits={"test": 1_000},
    texts="5 short captions per image, 5,000 in total",
    captions=5,
    notes="Karpathy's test split. The paper uses one prompt; its release uses seven, with the "
    "prompt of long captions (`kind: long`).",
    used_in="Tables 2 and 6",
)


class Options(CaptionOptions):
    """Which images of Flickr30k."""

    id: str = "clip-benchmark/wds_flickr30k"


_SET = Retrieval(CARD)
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
