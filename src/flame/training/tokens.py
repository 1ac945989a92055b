"""Captions as CLIP's tokens.

Shapes: N captions, n of them, L tokens.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from open_clip.tokenizer import tokenize

from flame.data.captions import of_kind
from flame.runtime.requests import HereOrThere, Request

# The only facet of a caption that is read as it is.
FACET = "tokens"


class Tokens:
    """Captions of one kind, as tokens of open_clip's byte-pair encoding, tokenized on demand.

    Attributes:
        keys: key of each of the N rows; keys may repeat.
        facets: the only facet, `FACET`.
        dim: L.
    """

    def __init__(
        self, captions: Path, kind: str, context_length: int, *, cache_bytes: int = 0
    ) -> None:
        """Open the captions of a kind.

        Args:
            captions: `captions.parquet` of a data set.
            kind: caption kind.
            context_length: L; longer captions are truncated, and still end with the end token.
            cache_bytes: the tokens of all rows are kept in memory if they fit.

        Raises:
            ValueError: there are no captions of this kind.
        """
        rows = of_kind(captions, kind)
        self.keys = rows["key"]
        self.facets = (FACET,)
        self.dim = context_length
        self._texts = rows["text"]
        fits = len(rows) * context_length * np.dtype(np.int32).itemsize <= cache_bytes
        self._kept = np.zeros((len(rows), context_length), np.int32) if fits else None

    def rows(self, indices: np.ndarray, facets: Sequence[str] | None = None) -> np.ndarray:
        """Rows by number, in any order, with repeats.

        Args:
            indices: (n,) integers in [0, N).
            facets: as in `Embeddings.rows`; there is only one.

        Returns:
            (n, 1, L) int32: start token, caption, end token, zeros.
        """
        if self._kept is None:
            return self._encode(indices)
        # Every text begins with the start token, which is not 0.
        new = np.unique(indices[self._kept[indices, 0] == 0])
        if len(new):
            self._kept[new] = self._encode(new)[:, 0]
        return self._kept[indices][:, None]

    def request(self, indices: np.ndarray, facets: Sequence[str] | None = None) -> Request:
        """A call that returns what `rows` does; another process gets the texts, and no more."""

        def texts() -> Request:
            return partial(encode, self._texts.gather(indices).to_list(), self.dim)

        return HereOrThere(partial(self.rows, indices), texts)

    def _encode(self, indices: np.ndarray) -> np.ndarray:
        return encode(self._texts.gather(indices).to_list(), self.dim)


def encode(texts: list[str], length: int) -> np.ndarray:
    """Tokens (n, 1, L) int32 of texts."""
    return tokenize(texts, length).numpy().astype(np.int32)[:, None]
