"""A tower, images and captions -> the unit vectors that every task compares."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flame.data import captions
from flame.data.images import ImageReader
from flame.embedding import provenance
from flame.embedding.store import Embeddings, by_kind
from flame.evaluation.tasks import Asked, Images, Texts
from flame.runtime import progress
from flame.runtime.device import device_of
from flame.runtime.errors import known
from flame.study.settings import Question
from flame.towers.base import Tower

T = TypeVar("T")


@runtime_checkable
class TextEncoder(Protocol):
    """A tower with its own text encoder, such as CLIP."""

    def encode_text(self, texts: Sequence[str], language: str | None = None) -> Tensor:
        """Text features (T, d), not normalised; `language` None means English."""


class Features:
    """Features of one tower for the questions of one job, computed on first use.

    Image features of the last data set are cached, so questions about one data set should be
    adjacent; backbone features are cached for two, the training and the test set of a probe.
    """

    def __init__(
        self,
        tower: Tower,
        datasets: Sequence[Path],
        stores: Sequence[Path],
        batch_size: int,
        title: str,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the inputs; nothing is computed yet.

        Args:
            tower: a tower; unless it is a `TextEncoder`, texts are read from the stores.
            datasets: folders of the data sets.
            stores: embedding stores of their captions, every part of every kind.
            batch_size: images or texts per forward pass.
            title: of the job, for the progress bar.
            trained: how the training texts were embedded, as recorded by
                `flame.embedding.provenance`; unknown for released or pretrained towers.
        """
        self._device = device_of()
        self._tower = tower.to(self._device)
        self._batch_size, self._title, self._trained = batch_size, title, trained
        self._datasets = {path.name: path for path in datasets}
        self._parts = by_kind(stores)
        self._images = lru_cache(maxsize=1)(partial(self._read, encode=tower.encode_image))
        visual = partial(backbone_features, tower)
        self._visual = lru_cache(maxsize=2)(partial(self._read, encode=visual))

    def asked(self, question: Question) -> Asked:
        """A question with access to its features."""
        return Asked(
            question,
            images=partial(self._images, question.dataset),
            visual=self._visual,
            texts=partial(self._texts, question),
        )

    def _read(self, dataset: str, encode: Callable[[Tensor], Tensor]) -> Images:
        reader = ImageReader(_get(self._datasets, dataset, "data set"))
        with progress.bar(len(reader), "images", f"{self._title}, {dataset}") as bar:
            features = image_features(
                encode,
                reader,
                self._tower.image_size,
                self._batch_size,
                self._device,
                bar.update,
                resize=self._tower.resize,
            )
        return Images(reader.keys, reader.labels, features)

    def _texts(self, question: Question, kind: str | None) -> Texts:
        if kind is None:
            raise ValueError(
                f"task {question.task!r} needs texts, but the benchmark names no kind of captions"
            )
        if isinstance(self._tower, TextEncoder):
            return self._encoded(self._tower, question, kind)
        return self._stored(question, kind)

    def _stored(self, question: Question, kind: str) -> Texts:
        """Texts embedded by a frozen LLM."""
        parts = _get(self._parts, kind, "embeddings of captions of kind")
        texts = Embeddings.open(parts, question.dataset)
        if texts.dim != self._tower.dim:
            raise ValueError(
                f"the tower was trained on text embeddings of width {self._tower.dim}, those of "
                f"{question.dataset!r} by {texts.attributes['llm']!r} have {texts.dim}"
            )
        if self._trained:
            provenance.check(self._trained, texts, question.facets, question.center)
        centers = self._tower.centers
        center = _get(centers, question.center, "center of kind") if centers else {}
        return Texts(texts.keys, text_features(texts, question.facets, center))

    def _encoded(self, encoder: TextEncoder, question: Question, kind: str) -> Texts:
        """Texts encoded by the tower itself, in the order of a store."""
        folder = _get(self._datasets, question.dataset, "data set")
        rows = captions.of_kind(folder / captions.FILE, kind)
        texts = rows["text"].to_list()
        features = encoded_features(encoder, texts, self._batch_size, question.language)
        return Texts(rows["key"].to_list(), features)


@torch.inference_mode()
def image_features(
    encode: Callable[[Tensor], Tensor],
    reader: ImageReader,
    image_size: int,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
    *,
    resize: str = "fit",
) -> Tensor:
    """Features of all images of a data set.

    Args:
        encode: (B, 3, H, W) pixels in [0, 1] -> (B, d).
        reader: I images.
        image_size: side of the square images, in pixels.
        batch_size: images per forward pass.
        device: of `encode`.
        on_batch: called with the number of images after each batch.
        resize: how images are made square; a name of `flame.data.pixels.RESIZES`.

    Returns:
        (I, d) float32, unit norm, on the CPU.
    """
    features = []
    for rows in torch.arange(len(reader)).split(batch_size):
        images = reader.load(rows.numpy(), image_size, resize).to(device).float() / 255
        features.append(normalize(encode(images).float(), dim=-1).cpu())
        on_batch(len(rows))
    return torch.cat(features)


def backbone_features(tower: Tower, images: Tensor) -> Tensor:
    """Backbone features before the projector, for linear probes.

    For a ViT, the mean of the patch tokens after the last block, without the final norm, as in the
    official release (`visual_only`); for other backbones, the pooled feature.

    Args:
        tower: a tower with a timm backbone; its projector is not used.
        images: (B, 3, H, W) pixels in [0, 1].

    Returns:
        (B, C).

    Raises:
        ValueError: the backbone is not from timm.
    """
    if not isinstance(tower, Tower):
        raise ValueError(
            "linear probes need a timm backbone, which a pretrained tower does not have"
        )
    pixels = (images - tower.mean) / tower.std
    if not hasattr(tower.visual, "num_prefix_tokens"):
        return tower.visual(pixels)
    (tokens,) = tower.visual.forward_intermediates(
        pixels, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
    )
    return tokens.mean(dim=1)


def text_features(
    texts: Embeddings, facets: Sequence[str], centers: Mapping[str, Tensor]
) -> Tensor:
    """One vector per caption: the normalised mean of its facets, which are not normalised.

    Args:
        texts: embeddings of T captions.
        facets: names of the facets to average.
        centers: facet -> (d,), mean vector of the training captions to subtract first; empty to
            subtract nothing.

    Returns:
        (T, d) float32, unit norm.
    """
    return torch.cat(
        [
            directions(torch.from_numpy(texts.rows(rows.numpy(), facets)), facets, centers)
            for rows in torch.arange(len(texts.keys)).split(1024)
        ]
    )


def directions(vectors: Tensor, facets: Sequence[str], centers: Mapping[str, Tensor]) -> Tensor:
    """Normalised mean facet of each text, (T, d) float32, unit norm.

    Args:
        vectors: (T, K, d), K facets of T texts.
        facets: names of the K facets.
        centers: facet -> (d,), subtracted first; empty to subtract nothing.
    """
    for facet in facets:
        if centers and facet not in centers:
            raise ValueError(f"no center of facet {known(facet, centers)}")
    center = torch.stack([centers[facet] for facet in facets]) if centers else torch.zeros(())
    return normalize((vectors.float() - center).mean(dim=1), dim=-1)


@torch.inference_mode()
def encoded_features(
    encoder: TextEncoder, texts: Sequence[str], batch_size: int, language: str | None = None
) -> Tensor:
    """One vector per text, from the tower's own text encoder.

    Args:
        encoder: a tower with a text encoder.
        texts: T texts.
        batch_size: texts per forward pass.
        language: of the texts; None means English.

    Returns:
        (T, d) float32, unit norm, on the CPU.
    """
    starts = range(0, len(texts), batch_size)
    parts = [encoder.encode_text(texts[start : start + batch_size], language) for start in starts]
    return torch.cat([normalize(part.float(), dim=-1).cpu() for part in parts])


def _get(table: Mapping[str, T], key: str | None, what: str) -> T:
    if key is None or key not in table:
        raise ValueError(f"no {what} {known(key, table)}")
    return table[key]
