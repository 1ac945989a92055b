"""Image-to-text and text-to-image recall at k, with any number of captions per image.

The protocol equals `clip_benchmark.metrics.zeroshot_retrieval`, down to the order of equal scores.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flame.evaluation.tasks import Answer, Asked, Hits, Images, Texts
from flame.runtime.device import device_of

RANKS = (1, 5, 10)


class _Side(NamedTuple):
    """The images, or the texts, that have a match."""

    rows: list[int]
    keys: list[str]
    features: Tensor
    ids: Tensor
    """(n,) int, number of the matching image."""


def evaluate(asked: Asked) -> Answer:
    """Recall at 1, 5 and 10 in both directions, as `i2t_r@1` and so on (Tables 1, 2 and 6).

    A query is a hit at k if any of its matches is among its k best. Its key is that of the image.

    Raises:
        ValueError: no text matches any image.
    """
    images, texts = asked.images(), asked.texts(asked.question.captions)
    shared = set(images.keys) & set(texts.keys)
    if not shared:
        raise ValueError(
            f"no text belongs to an image: text keys like {list(texts.keys[:2])}, "
            f"image keys like {list(images.keys[:2])}"
        )
    numbers = {key: n for n, key in enumerate(key for key in images.keys if key in shared)}
    sides = {"i": _side(images, numbers), "t": _side(texts, numbers)}
    metrics = {}
    for way in ("i2t", "t2i"):
        query, gallery = sides[way[0]], sides[way[-1]]
        for k, best in best_at(query.features, gallery.features, RANKS).items():
            hit = (gallery.ids[best] == query.ids[:, None]).any(dim=1)
            first = [gallery.keys[j] for j in best[:, 0].tolist()] if k == 1 else None
            metrics[f"{way}_r@{k}"] = Hits(query.keys, hit, query.rows, first)
    joined = {name: len(side.rows) for name, side in sides.items()}
    everything = len(images.keys) + len(texts.keys)
    return Answer(metrics, joined["i"], joined["t"], unjoined=everything - sum(joined.values()))


def _side(given: Images | Texts, numbers: dict[str, int]) -> _Side:
    rows = [row for row, key in enumerate(given.keys) if key in numbers]
    keys = [given.keys[row] for row in rows]
    return _Side(rows, keys, given.features[rows], torch.tensor([numbers[key] for key in keys]))


def best_at(
    queries: Tensor, gallery: Tensor, ranks: Sequence[int], *, chunk: int = 1024
) -> dict[int, Tensor]:
    """The k best entries of a gallery for each query; computed on the GPU if there is one.

    Args:
        queries: (Q, d).
        gallery: (G, d).
        ranks: values of k; at most G are returned.
        chunk: queries per product, so that memory is `chunk * G` and not `Q * G`.

    Returns:
        k -> (Q, k) int, best first.
    """
    best: dict[int, list[Tensor]] = {k: [] for k in ranks}
    device = device_of()
    gallery = gallery.to(device)
    for part in queries.split(chunk):
        scores = part.to(device) @ gallery.T
        for k in ranks:
            # One topk per k: with equal scores, the first of the top 10 may differ from the top 1.
            best[k].append(scores.topk(min(k, len(gallery)), dim=1).indices.cpu())
    return {k: torch.cat(parts) for k, parts in best.items()}
