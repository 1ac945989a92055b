"""Image-to-text and text-to-image recall at k, with any number of captions per image.

The protocol, down to the order of equal scores, is that of
`clip_benchmark.metrics.zeroshot_retrieval`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flame.tasks import Answer, Hits

RANKS = (1, 5, 10)


def evaluate(
    images: Tensor,
    image_keys: Sequence[str],
    image_labels: Sequence[str | None],
    texts: Tensor,
    text_keys: Sequence[str],
) -> Answer:
    """Recall at 1, 5 and 10 both ways, as `i2t_r@1` and so on (Tables 1, 2 and 6).

    A query is a hit at k if any of its partners is among its k best; its key is that of the image.

    Raises:
        ValueError: no text belongs to any of the images.
    """
    shared = set(image_keys) & set(text_keys)
    image_rows = [i for i, key in enumerate(image_keys) if key in shared]
    text_rows = [j for j, key in enumerate(text_keys) if key in shared]
    if not shared:
        raise ValueError(
            f"no text belongs to an image: text keys like {list(text_keys[:2])}, "
            f"image keys like {list(image_keys[:2])}"
        )
    number = {image_keys[i]: n for n, i in enumerate(image_rows)}
    sides = {
        "i": (images[image_rows], [image_keys[i] for i in image_rows]),
        "t": (texts[text_rows], [text_keys[j] for j in text_rows]),
    }
    ids = {side: torch.tensor([number[k] for k in keys]) for side, (_, keys) in sides.items()}
    metrics = {}
    for query, gallery in ("it", "ti"):
        features, keys = sides[query]
        hits = hits_at(features, ids[query], sides[gallery][0], ids[gallery], RANKS)
        for k, hit in hits.items():
            metrics[f"{query}2{gallery}_r@{k}"] = Hits(keys, hit)
    return Answer(
        metrics,
        images=len(image_rows),
        texts=len(text_rows),
        unjoined=len(image_keys) + len(text_keys) - len(image_rows) - len(text_rows),
    )


def hits_at(
    queries: Tensor,
    query_ids: Tensor,
    gallery: Tensor,
    gallery_ids: Tensor,
    ranks: Sequence[int],
    *,
    chunk: int = 1024,
) -> dict[int, Tensor]:
    """Whether the k entries of a gallery that score best hold one with the query's id.

    Args:
        queries: (Q, d).
        query_ids: (Q,) int.
        gallery: (G, d).
        gallery_ids: (G,) int.
        ranks: values of k; a k over G counts as G.
        chunk: queries scored at a time, so that memory is `chunk * G` and not `Q * G`.

    Returns:
        k -> (Q,) bool.
    """
    hits: dict[int, list[Tensor]] = {k: [] for k in ranks}
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ gallery.T
        wanted = query_ids[start : start + chunk, None]
        for k in ranks:
            # One topk per k: among equal scores, the first of ten best is not always the best one.
            best = scores.topk(min(k, len(gallery)), dim=1).indices
            hits[k].append((gallery_ids[best] == wanted).any(dim=1))
    return {k: torch.cat(parts) for k, parts in hits.items()}
