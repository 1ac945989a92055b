"""Retrieval within groups of images that are alike but for one thing.

Recall among all images of a set says little of details: the main object and the place already
tell most images apart. Here each image must find its caption, and each caption its image, among
those of its group (ours; Winoground and Urban-1k have the same idea).
"""

from collections import defaultdict

import torch
from torch import Tensor

from flame.evaluation.tasks import Answer, Asked, Hits
from flame.evaluation.tasks._groups import groups


def evaluate(asked: Asked) -> Answer:
    """Recall at 1 within the groups, as `i2t_r@1` and `t2i_r@1`; with groups of n, chance is 1/n.

    Images of a group have keys `<group>-0`, `<group>-1` and so on, and one caption each. A group
    takes part if it has at least two images, all with a caption.

    Raises:
        ValueError: an image has several captions, a key names no group, or nothing takes part.
    """
    question = asked.question
    images, texts = asked.images(), asked.texts(question.captions)
    found = list(groups(images, texts))
    if not found:
        raise ValueError(
            f"no group of {question.dataset!r} has all its captions: image keys like "
            f"{list(images.keys[:2])}, text keys like {list(texts.keys[:2])}"
        )
    rows = [row for choice in found for row in choice.rows]
    keys = [images.keys[row] for row in rows]
    hits: dict[str, list[Tensor]] = defaultdict(list)
    best: dict[str, list[str]] = defaultdict(list)
    for choice in found:
        scores = choice.images @ choice.texts.T
        own = torch.arange(len(scores))
        for metric, dim in (("i2t_r@1", 1), ("t2i_r@1", 0)):
            first = scores.argmax(dim=dim)
            hits[metric].append(first == own)
            best[metric] += [images.keys[choice.rows[i]] for i in first.tolist()]
    metrics = {name: Hits(keys, torch.cat(hit), rows, best[name]) for name, hit in hits.items()}
    everything = len(images.keys) + len(texts.keys)
    return Answer(metrics, len(rows), len(rows), unjoined=everything - 2 * len(rows))
