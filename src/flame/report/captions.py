"""Comparison of the captions of the same images by two captioners."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from flame.data import captions
from flame.embedding.store import Embeddings
from flame.evaluation.features import directions
from flame.report.figures.examples import evenly

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
LARGEST = 5000  # images, all pairs of whose captions are compared
ROWS = 512  # of a store, per read


class Captions(NamedTuple):
    """Captions of one kind by one captioner, one per image.

    Args:
        texts: N texts.
        features: (N, d) float32, unit norm.
    """

    texts: list[str]
    features: torch.Tensor


class Similarity(NamedTuple):
    """Similarity of two captioners' captions: cosines of their embeddings.

    Args:
        same: (N,) between the two captions of an image.
        other: (N,) between captions of different images.
        nearest: share of the first captioner's captions whose nearest caption by the second is
            that of the same image.
    """

    same: np.ndarray
    other: np.ndarray
    nearest: float


def matched(
    folders: Sequence[Path], stores: Sequence[Path], kind: str, facets: Sequence[str]
) -> tuple[Captions, Captions]:
    """Captions of the images in both data sets, at most `LARGEST`, evenly spaced.

    Args:
        folders: of the two data sets, each with `captions.parquet`.
        stores: parts of the stores of this kind, which hold one or both data sets.
        kind: of the captions; the first one of an image is used.
        facets: to average.

    Raises:
        ValueError: fewer than two images in common.
    """
    tables, embeddings = [], []
    for folder in folders:
        parts = [part for part in stores if (part / folder.name).is_dir()]
        opened = Embeddings.open(parts, folder.name)
        texts = captions.first_of_kind(captions.scan(folder / captions.FILE), kind)
        rows = pl.LazyFrame({"key": opened.keys}).with_row_index("row")
        tables.append(texts.join(rows.unique("key", keep="first"), on="key", maintain_order="left"))
        embeddings.append(opened)
    common = tables[0].join(tables[1], on="key", maintain_order="left").collect()
    if len(common) < 2:
        names = " and ".join(repr(folder.name) for folder in folders)
        raise ValueError(
            f"{len(common)} images have {kind} captions in {names}: nothing to compare"
        )
    common = common[evenly(len(common), LARGEST)]
    first, second = (
        Captions(common[text].to_list(), _features(opened, common[row].to_numpy(), facets))
        for opened, text, row in zip(
            embeddings, ("text", "text_right"), ("row", "row_right"), strict=True
        )
    )
    return first, second


def _features(embeddings: Embeddings, rows: np.ndarray, facets: Sequence[str]) -> torch.Tensor:
    """Directions (N, d) of some rows, read in blocks to save memory."""
    blocks = (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))
    read = (torch.from_numpy(embeddings.rows(block, facets)) for block in blocks)
    return torch.cat([directions(vectors, facets, {}) for vectors in read])


def words_of(texts: Iterable[str]) -> list[list[str]]:
    """Lower-case words of each text; apostrophes and hyphens do not split words."""
    return [WORD.findall(text.lower()) for text in texts]


def growth(words: Iterable[Sequence[str]]) -> tuple[list[int], list[int]]:
    """Running counts of words and of distinct words, after each caption."""
    read, distinct = [0], [0]
    seen: set[str] = set()
    for caption in words:
        seen.update(caption)
        read.append(read[-1] + len(caption))
        distinct.append(len(seen))
    return read, distinct


def shared(
    first: Iterable[Sequence[str]], second: Iterable[Sequence[str]]
) -> tuple[float, float, float]:
    """Overlap of two vocabularies.

    Returns:
        Share of distinct words that both use; share of the first one's words that the second one
        uses as well; the same the other way round.
    """
    written = [[word for caption in words for word in caption] for words in (first, second)]
    one, two = map(set, written)
    of_first, of_second = (
        sum(word in other for word in words) / max(len(words), 1)
        for words, other in zip(written, (two, one), strict=True)
    )
    return len(one & two) / max(len(one | two), 1), of_first, of_second


def similarity(first: torch.Tensor, second: torch.Tensor) -> Similarity:
    """Cosines of the captions of two captioners.

    Args:
        first: (N, d), unit norm.
        second: (N, d), unit norm, of the same images.
    """
    cosines = first @ second.T
    same = cosines.diagonal()
    other = (first * second.roll(len(second) // 2, dims=0)).sum(dim=1)
    # A tie counts as nearest: captions with the same words are equally near.
    nearest = (same >= cosines.max(dim=1).values).float().mean()
    return Similarity(same.numpy(), other.numpy(), float(nearest))
