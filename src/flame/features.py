"""Images and captions -> the unit vectors that every task compares."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flame.config import known
from flame.images import ImageReader
from flame.model import FlameTower
from flame.store import Embeddings


@torch.inference_mode()
def image_features(
    tower: FlameTower,
    reader: ImageReader,
    image_size: int,
    batch_size: int,
    on_batch: Callable[[int], Any],
) -> Tensor:
    """Features of all images of a data set.

    Args:
        tower: visual tower.
        reader: I images.
        image_size: pixels, both sides, that the tower wants.
        batch_size: images per forward pass.
        on_batch: told the number of images of every batch done.

    Returns:
        (I, d) float32, unit norm, on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = tower.to(device)
    features = []
    for rows in torch.arange(len(reader.keys)).split(batch_size):
        images = reader.load(rows.numpy(), image_size).to(device).float() / 255
        features.append(normalize(tower.encode_image(images), dim=-1).cpu())
        on_batch(len(rows))
    return torch.cat(features)


def text_features(
    texts: Embeddings, facets: Sequence[str], centers: Mapping[str, Tensor]
) -> Tensor:
    """One vector per caption: the mean of its facets, un-normalised, and then its direction.

    Args:
        texts: embeddings of T captions.
        facets: names of the facets to average.
        centers: facet -> (d,), mean vector of the training captions to subtract first;
            empty where nothing is.

    Returns:
        (T, d) float32, unit norm.
    """
    for facet in facets:
        if centers and facet not in centers:
            raise ValueError(f"no center of facet {known(facet, centers)}")
    center = torch.stack([centers[facet] for facet in facets]) if centers else torch.zeros(())
    means = []
    for rows in torch.arange(len(texts.keys)).split(1024):
        vectors = torch.from_numpy(texts.rows(rows.numpy(), facets)).float()
        means.append((vectors - center).mean(dim=1))
    return normalize(torch.cat(means), dim=-1)
