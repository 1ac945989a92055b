"""Compositionality: telling apart captions of almost the same words (Table C3).

There are two forms. As in Winoground, the images of a group have keys `<group>-0`, `<group>-1` and
so on and one caption each; every image must find its caption and every caption its image. As in
SugarCrepe, an image has one true caption and one or more false ones. The protocol follows
`clip_benchmark.metrics.image_caption_selection`: the first of equal scores wins, and the true
caption comes first. A tie is therefore a hit, unlike in SugarCrepe's own code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from flame.evaluation.tasks import Answer, Asked, Hits, Images, Texts
from flame.evaluation.tasks._groups import Choice, groups, one_each, rows_of


def evaluate(asked: Asked) -> Answer:
    """`image_score`, `text_score` and `group_score` of groups, or `accuracy` of single images.

    Images form groups if the question has no `negatives`. A group takes part if it has at least two
    images, all with a caption; a single image if it has a true and a false caption.

    Raises:
        ValueError: an image has several true captions, a key names no group, or nothing takes part.
    """
    question = asked.question
    images, positives = asked.images(), asked.texts(question.captions)
    if question.negatives is None:
        texts, choices = [positives], list(groups(images, positives))
    else:
        texts = [positives, asked.texts(question.negatives)]
        choices = list(_alone(images, *texts))
    if not choices:
        raise ValueError(
            f"no image of {question.dataset!r} has the captions it needs: image keys like "
            f"{list(images.keys[:2])}, text keys like {[list(t.keys[:2]) for t in texts]}"
        )
    keys = [choice.key for choice in choices]
    right = torch.tensor([matched(choice.images, choice.texts) for choice in choices])
    if question.negatives is None:
        scores = {"image_score": right[:, 0], "text_score": right[:, 1]}
        scores["group_score"] = right.all(dim=1)
        metrics = {name: Hits(keys, hit) for name, hit in scores.items()}
    else:
        metrics = {"accuracy": Hits(keys, right[:, 1], [choice.rows[0] for choice in choices])}
    num_images = sum(len(choice.images) for choice in choices)
    num_texts = sum(len(choice.texts) for choice in choices)
    everything = len(images.keys) + sum(len(given.keys) for given in texts)
    return Answer(metrics, num_images, num_texts, unjoined=everything - num_images - num_texts)


def matched(images: Tensor, texts: Tensor) -> tuple[bool, bool]:
    """Whether every text finds its image, and whether every image finds its text.

    Args:
        images: (n, d), unit norm; the i-th matches the i-th text.
        texts: (m, d), unit norm; those after the n-th match no image.
    """
    scores = images @ texts.T
    own = torch.arange(min(scores.shape))
    texts_find, images_find = (scores.argmax(dim=dim)[: len(own)] == own for dim in (0, 1))
    return bool(texts_find.all()), bool(images_find.all())


def _alone(images: Images, positives: Texts, negatives: Texts) -> Iterator[Choice]:
    true, false = one_each(positives), rows_of(negatives)
    for row, key in enumerate(images.keys):
        if key in true and key in false:
            pair = positives.features[[true[key]]], negatives.features[false[key]]
            yield Choice(key, [row], images.features[[row]], torch.cat(pair))
