"""Zero-shot classification: an image is assigned the class with the nearest texts.

The protocol equals `clip_benchmark.metrics.zeroshot_classification`, down to the order of equal
scores.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flame.evaluation.tasks import Answer, Asked, Hits
from flame.runtime.errors import known


def evaluate(asked: Asked) -> Answer:
    """Top-1 accuracy as `top1` and, with five classes or more, `top5` (Tables 3, 4 and 6).

    Raises:
        ValueError: an image has no label, or one without a text.
    """
    images, texts = asked.images(), asked.texts(asked.question.captions)
    classes = {label: c for c, label in enumerate(dict.fromkeys(texts.keys))}
    for key, label in zip(images.keys, images.labels, strict=True):
        if label not in classes:
            raise ValueError(f"label of image {key!r} has no class text: {known(label, classes)}")
    target = torch.tensor([classes[str(label)] for label in images.labels])
    text_class = torch.tensor([classes[key] for key in texts.keys])
    best = top_classes(images.features, class_vectors(texts.features, text_class))
    hits = best == target[:, None]
    metrics = {
        f"top{k}": Hits(images.keys, hits[:, :k].any(dim=1)) for k in sorted({1, hits.shape[1]})
    }
    return Answer(metrics, images=len(images.keys), texts=len(texts.keys), unjoined=0)


def class_vectors(texts: Tensor, text_class: Tensor) -> Tensor:
    """Mean direction of each class's texts.

    Args:
        texts: (T, d), one row per class and template.
        text_class: (T,) int in [0, C).

    Returns:
        (C, d), unit norm.
    """
    directions = normalize(texts, dim=-1)
    num_classes = int(text_class.max()) + 1
    means = [directions[text_class == c].mean(dim=0) for c in range(num_classes)]
    return normalize(torch.stack(means), dim=-1)


def top_classes(images: Tensor, classes: Tensor, *, chunk: int = 4096) -> Tensor:
    """Nearest classes of every image, best first.

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
    return torch.cat([(part @ classes.T).topk(k, dim=1).indices for part in images.split(chunk)])
