"""MSCOCO captions, the test images of Karpathy's split."""

from flame.data.datasets import Card
from flame.data.datasets._wds import CaptionOptions, Retrieval

CARD = Card(
    title="MSCOCO",
    source="hub: clip-benchmark/wds_mscoco_captions (webdataset, test/{0..4}.tar)",
    licence="of the images: not verified",
    splits={"test": 5_000},
    texts="5 short captions per image, 25,010 in total: a few have six",
    captions=6,
    notes="Karpathy's test split, images of val2014. All captions of an image are used, "
    "even a sixth one, as in CLIP_benchmark. Long-CLIP's own script uses val2017 and the first "
    "five captions, which is another protocol. The paper uses one prompt; its release uses seven, "
    "with the prompt of long captions (`kind: long`).",
    used_in="Tables 2 and 6",
)


class Options(CaptionOptions):
    """Which images of MSCOCO."""

    id: str = "clip-benchmark/wds_mscoco_captions"


_SET = Retrieval(CARD)
size, classes, read, report = _SET.size, _SET.classes, _SET.read, _SET.report
