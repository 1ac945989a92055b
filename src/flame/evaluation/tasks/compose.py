"""Whether a tower tells captions apart that are made of almost the same words (Table C3).

Two forms. As in Winoground, the images of a group, with keys `<group>-0`, `<group>-1` and so on,
each have one caption, and every image must find its caption, every caption its image. As in
SugarCrepe, an image has one true caption and one or more false ones. The protocol is that of
`clip_benchmark.metrics.image_caption_selection`: of equal scores the first counts as the larger,
and a true caption stands before the false ones. So a tie is a hit, unlike in SugarCrepe's own code.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flame.evaluation.tasks import Answer, Asked, Hits, Images, Texts


class Choice(NamedTuple):
    """One query: n images and m texts, of which the i-th ones belong together."""

    key: str
    row: int
    """Place of its first image among the images."""
    images: Tensor
    """(n, d)."""
    texts: Tensor
    """(m, d)."""


def evaluate(asked: Asked) -> Answer:
    """Of groups `image_score`, `text_score` and `group_score`; of images alone `accuracy`.

    Images are taken in groups where the question names no `negatives`. A group takes part if it has
    two images or more, all with a caption; an image alone if it has a true and a false caption.

    Raises:
        ValueError: an image with several true captions, a key that names no group, or nothing that
            takes part.
    """
    question = asked.question
    images, positives = asked.images(), asked.texts(question.captions)
    if question.negatives is None:
        texts, choices = [positives], list(_groups(images, positives))
    else:
        texts = [positives, asked.texts(question.negatives)]
        choices = list(_alone(images, *texts))
    if not choices:
        raise ValueError(
            f"no image of {question.dataset!r} can be asked about: image keys like "
            f"{list(images.keys[:2])}, text keys like {[list(t.keys[:2]) for t in texts]}"
        )
    keys = [choice.key for choice in choices]
    right = torch.tensor([matched(choice.images, choice.texts) for choice in choices])
    if question.negatives is None:
        scores = {"image_score": right[:, 0], "text_score": right[:, 1]}
        scores["group_score"] = right.all(dim=1)
        metrics = {name: Hits(keys, hit) for name, hit in scores.items()}
    else:
        metrics = {"accuracy": Hits(keys, right[:, 1], [choice.row for choice in choices])}
    num_images = sum(len(choice.images) for choice in choices)
    num_texts = sum(len(choice.texts) for choice in choices)
    everything = len(images.keys) + sum(len(given.keys) for given in texts)
    return Answer(metrics, num_images, num_texts, unjoined=everything - num_images - num_texts)


def matched(images: Tensor, texts: Tensor) -> tuple[bool, bool]:
    """Whether every text finds its image, and whether every image finds its text.

    Args:
        images: (n, d), unit norm; the i-th belongs to the i-th text.
        texts: (m, d), unit norm; those after the n-th belong to no image.
    """
    scores = images @ texts.T
    own = torch.arange(min(scores.shape))
    texts_find, images_find = (scores.argmax(dim=dim)[: len(own)] == own for dim in (0, 1))
    return bool(texts_find.all()), bool(images_find.all())


def _groups(images: Images, positives: Texts) -> Iterator[Choice]:
    caption = _one_each(positives)
    groups = defaultdict(list)
    for row, key in enumerate(images.keys):
        group, _, number = key.rpartition("-")
        if not group or not number.isdigit():
            raise ValueError(f"image key {key!r} names no group; known are keys like 'name-0'")
        groups[group].append(row)
    for group, rows in groups.items():
        own = [caption[images.keys[row]] for row in rows if images.keys[row] in caption]
        if len(own) == len(rows) > 1:
            yield Choice(group, rows[0], images.features[rows], positives.features[own])


def _alone(images: Images, positives: Texts, negatives: Texts) -> Iterator[Choice]:
    true, false = _one_each(positives), _rows_of(negatives)
    for row, key in enumerate(images.keys):
        if key in true and key in false:
            pair = positives.features[[true[key]]], negatives.features[false[key]]
            yield Choice(key, row, images.features[[row]], torch.cat(pair))


def _one_each(texts: Texts) -> dict[str, int]:
    rows = _rows_of(texts)
    for key, own in rows.items():
        if len(own) > 1:
            raise ValueError(f"image {key!r} has {len(own)} true captions, and not one")
    return {key: own[0] for key, own in rows.items()}


def _rows_of(texts: Texts) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(texts.keys):
        rows[key].append(row)
    return dict(rows)
