"""A tower, images and captions -> the unit vectors that every task compares."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flame.data import captions
from flame.embedding import provenance
from flame.embedding.store import Embeddings, by_kind
from flame.evaluation.decoding import Decoder
from flame.evaluation.forward import Precision, unit_vectors
from flame.evaluation.images import PROJECTED, VISUAL, ImageFeatures
from flame.evaluation.tasks import Asked, Texts
from flame.runtime.device import device_of
from flame.runtime.errors import known
from flame.study.settings import Question
from flame.towers.base import Tower

T = TypeVar("T")
READ_ROWS = 1024  # texts read at a time


@runtime_checkable
class TextEncoder(Protocol):
    """A tower with its own text encoder, such as CLIP."""

    def encode_text(self, texts: Sequence[str], language: str | None = None) -> Tensor:
        """Text features (T, d), not normalised; `language` None means English."""


class Features:
    """Features of one tower for the questions of one job, computed on first use.

    In memory are the image features that `ImageFeatures` keeps and, for a task that needs all texts
    at a time, T x d x 4 bytes of text features.
    """

    def __init__(
        self,
        tower: Tower,
        datasets: Sequence[Path],
        stores: Sequence[Path],
        batch_size: int,
        title: str,
        trained: Mapping[str, Any] | None = None,
        *,
        questions: Sequence[Question] = (),
        precision: Precision = "float32",
        decoder: Decoder | None = None,
        device: torch.device | None = None,
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
            questions: all that will be asked, so that features of an image set that several of them
                need are computed in one pass.
            precision: of the tower's forward passes.
            decoder: of the images; in this process by default.
            device: of the tower; by default a GPU if there is one.
        """
        self._device = device or device_of()
        self._tower = tower.to(self._device)
        self._batch_size, self._trained, self._precision = batch_size, trained, precision
        self._datasets = {path.name: path for path in datasets}
        self._parts = by_kind(stores)
        self._images = ImageFeatures(
            self._tower,
            self._datasets,
            questions,
            decoder or Decoder(),
            batch_size=batch_size,
            device=self._device,
            precision=precision,
            title=title,
        )

    def asked(self, question: Question) -> Asked:
        """A question with access to its features."""
        return Asked(
            question,
            images=lambda: self._images.of(question.dataset, PROJECTED),
            visual=lambda dataset: self._images.of(dataset, VISUAL),
            texts=lambda kind: self._texts(question, kind),
        )

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
        keys = texts.keys.to_list()
        return Texts(keys, lambda rows: text_features(texts, question.facets, center, rows))

    def _encoded(self, encoder: TextEncoder, question: Question, kind: str) -> Texts:
        """Texts encoded by the tower itself, in the order of a store."""
        folder = _get(self._datasets, question.dataset, "data set")
        rows = captions.of_kind(folder / captions.FILE, kind)
        # All in their order, as features depend on the others in a batch by rounding.
        features = encoded_features(
            encoder,
            rows["text"].to_list(),
            self._batch_size,
            question.language,
            device=self._device,
            precision=self._precision,
        )
        return Texts(rows["key"].to_list(), features.__getitem__)


def text_features(
    texts: Embeddings,
    facets: Sequence[str],
    centers: Mapping[str, Tensor],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """One vector per caption: the normalised mean of its facets, which are not normalised.

    Args:
        texts: embeddings of captions.
        facets: names of the facets to average.
        centers: facet -> (d,), mean vector of the training captions to subtract first; empty to
            subtract nothing.
        rows: numbers of T captions; all by default.

    Returns:
        (T, d) float32, unit norm.
    """
    chosen = torch.arange(len(texts.keys)) if rows is None else torch.as_tensor(rows)
    found, done = torch.empty(len(chosen), texts.dim), 0
    for part in chosen.split(READ_ROWS):
        vectors = torch.from_numpy(texts.rows(part.numpy(), facets))
        found[done : done + len(part)] = directions(vectors, facets, centers)
        done += len(part)
    return found


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


def encoded_features(
    encoder: TextEncoder,
    texts: Sequence[str],
    batch_size: int,
    language: str | None = None,
    *,
    device: torch.device | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """One vector per text, from the tower's own text encoder.

    Args:
        encoder: a tower with a text encoder.
        texts: T texts.
        batch_size: texts per forward pass.
        language: of the texts; None means English.
        device: of the encoder; the CPU by default.
        precision: of the forward passes.

    Returns:
        (T, d) float32, unit norm, on the CPU.
    """
    parts = [
        unit_vectors(
            lambda some: encoder.encode_text(some, language),
            texts[start : start + batch_size],
            device or torch.device("cpu"),
            precision,
        ).cpu()
        for start in range(0, len(texts), batch_size)
    ]
    return torch.cat(parts)


def _get(table: Mapping[str, T], key: str | None, what: str) -> T:
    if key is None or key not in table:
        raise ValueError(f"no {what} {known(key, table)}")
    return table[key]
