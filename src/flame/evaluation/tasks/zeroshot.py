"""Zero-shot classification: an image is assigned the class with the nearest texts.

The protocol equals `clip_benchmark.metrics.zeroshot_classification`, down to the order of equal
scores.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flame.evaluation.tasks import Answer, Asked, Hits
from flame.runtime.device import device_of
from flame.runtime.errors import known


def evaluate(asked: Asked) -> Answer:
    """Top-1 accuracy as `top1` and, with five classes or more, `top5` (Tables 3, 4 and 6).

    Raises:
        ValueError: an image has no label, or one without a text.
    """
    images, texts = asked.images(), asked.texts(asked.question.captions)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(texts.keys):
        rows_of[key].append(row)
    classes = {label: c for c, label in enumerate(rows_of)}
    for key, label in zip(images.keys, images.labels, strict=True):
        if label not in classes:
            raise ValueError(f"label of image {key!r} has no class text: {known(label, classes)}")
    target = torch.tensor([classes[str(label)] for label in images.labels])
    # Class by class: all texts of ImageNet in English would be 80,000 vectors.
    vectors = class_vectors(texts.read(rows) for rows in rows_of.values())
    best = top_classes(images.features, vectors)
    hits = best == target[:, None]
    metrics = {
        f"top{k}": Hits(images.keys, hits[:, :k].any(dim=1)) for k in sorted({1, hits.shape[1]})
    }
    return Answer(metrics, images=len(images.keys), texts=len(texts.keys), unjoined=0)


def class_vectors(texts: Iterable[Tensor]) -> Tensor:
    """Mean direction of each class's texts.

    Args:
        texts: of each of C classes, (n, d), one row per template.

    Returns:
        (C, d), unit norm.
    """
    means = [normalize(own, dim=-1).mean(dim=0) for own in texts]
    return normalize(torch.stack(means), dim=-1)


def top_classes(images: Tensor, classes: Tensor, *, chunk: int = 4096) -> Tensor:
    """Nearest classes of every image, best first; computed on the GPU if there is one.

    Args:
        images: (I, d), unit norm.
        classes: (C, d), unit norm.
        chunk: images per product, so that memory does not grow with I.

    Returns:
        (I, 5) int, or (I, 1) with fewer than five classes.
    """
    # The first of the top 5, not an argmax: classes of the same name, as in ImageNet, have equal
    # scores, and clip_benchmark takes the first of its topk.
    k = 5 if len(classes) >= 5 else 1
    device = device_of()
    classes = classes.to(device)
    scores = (part.to(device) @ classes.T for part in images.split(chunk))
    return torch.cat([score.topk(k, dim=1).indices.cpu() for score in scores])
