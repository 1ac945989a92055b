"""A tower, images and captions -> the unit vectors that every task compares."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from flame.data.images import ImageReader
from flame.embedding import provenance
from flame.embedding.store import Embeddings, by_kind
from flame.evaluation.tasks import Asked, Images, Texts
from flame.runtime import progress
from flame.runtime.checksums import verified
from flame.runtime.device import device_of
from flame.runtime.errors import known
from flame.study.settings import Question
from flame.towers.base import Tower

T = TypeVar("T")


@runtime_checkable
class TextEncoder(Protocol):
    """A tower with a text tower of its own, such as CLIP's."""

    def encode_text(self, texts: Sequence[str], language: str | None = None) -> Tensor:
        """Text features (T, d), not normalised, of texts in a language; null: English."""


class Features:
    """Features of one tower for the questions of one job, computed when first asked for.

    Those of the last data set are kept, so questions about one data set should come together; of
    the backbone's own features those of the last two, which a probe trains and tests on.
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
        """Take what features are made of; nothing is computed yet.

        Args:
            tower: its texts come from the stores, if it is no `TextEncoder`.
            datasets: folders of the data sets.
            stores: embedding stores of their captions: every part of every kind.
            batch_size: images, or texts, per forward pass.
            title: of the job, for the progress bar.
            trained: how the texts that it was trained on were embedded, as
                `flame.embedding.provenance` says it; not known of a tower of others.
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
        """A question, with what is needed to answer it."""
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
            raise ValueError(f"task {question.task!r} needs texts, but no kind of them is named")
        if isinstance(self._tower, TextEncoder):
            return self._encoded(self._tower, question, kind)
        return self._stored(question, kind)

    def _stored(self, question: Question, kind: str) -> Texts:
        """Texts that a frozen LLM embedded."""
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
        """Texts that the tower encodes itself, in the order in which a store would have them."""
        folder = _get(self._datasets, question.dataset, "data set")
        captions = pl.read_parquet(verified(folder / "captions.parquet"))
        rows = captions.filter(kind=kind)
        if rows.is_empty():
            kinds = sorted(set(captions["kind"]))
            raise ValueError(f"{folder} has no captions of kind {known(kind, kinds)}")
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
        image_size: pixels, both sides, that `encode` wants.
        batch_size: images per forward pass.
        device: of `encode`.
        on_batch: told the number of images of every batch done.
        resize: how images become squares; a name of `flame.data.images.RESIZES`.

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
    """What the backbone says of images, before the projector: the features of a linear probe.

    Of a ViT the mean of the patch tokens after the last block, without its final norm, as in the
    official release (`visual_only`); of other backbones the pooled feature.

    Args:
        tower: its projector is passed by.
        images: (B, 3, H, W) pixels in [0, 1].

    Returns:
        (B, C).

    Raises:
        ValueError: a tower whose backbone is not one of timm.
    """
    if not isinstance(tower, Tower):
        raise ValueError("no linear probe of a pretrained tower: its backbone is not timm's")
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
    """One vector per caption: the mean of its facets, un-normalised, and then its direction.

    Args:
        texts: embeddings of T captions.
        facets: names of the facets to average.
        centers: facet -> (d,), mean vector of the training captions to subtract first;
            empty where nothing is.

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
    """Direction (T, d) float32, unit norm, of the mean facet of texts.

    Args:
        vectors: (T, K, d), K facets of T texts.
        facets: names of the K facets.
        centers: facet -> (d,), what is subtracted first; empty where nothing is.
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
    """One vector per text, by a tower's own text tower.

    Args:
        encoder: the tower.
        texts: T texts.
        batch_size: texts per forward pass.
        language: of the texts; null: English.

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
