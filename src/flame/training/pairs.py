"""Images and their text embeddings or tokens, joined by key into training batches.

A batch is a pure function of (seed, step): the order of images and the choice of captions and
facets come from generators that are seeded by their purpose. So a resumed run needs no saved RNG
state. All that grows with the number of images is held by the main process; its workers get calls
that read a few images (`flame.training.loader`).

Shapes: B images of this process, S pixels, K facets of a step, D width of the embeddings, or
number of tokens for methods that read the captions themselves.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Literal, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from flame.data.images import ImageReader
from flame.runtime.requests import Request
from flame.study.settings import Training
from flame.training.batches import Batch, WorkItem, generator, read

# Images decoded at a time when all images are cached.
_DECODE = 512


class Texts(Protocol):
    """Captions of one kind, a row each: stored embeddings, or `flame.training.tokens.Tokens`."""

    keys: pl.Series

    def request(self, indices: np.ndarray, facets: Sequence[str]) -> Request:
        """A call that reads rows (n, K, D) by number, of these facets."""
        ...


class Pairs:
    """Images that have a caption of every target kind.

    Attributes:
        kinds: target caption kinds.
        facets: (kind, facet) of each target facet, in the order of `Batch.texts`.
        used: number of images with captions.
        skipped: reason -> number of images or captions left out.
        cached: whether all images are in memory, decoded.
        drawings: images of each pair, of which an epoch takes one.
    """

    def __init__(
        self,
        images: ImageReader,
        stores: Mapping[str, Texts],
        targets: Mapping[str, Sequence[str]],
        *,
        image_size: int,
        resize: str = "fit",
        max_skipped: float,
        cache_bytes: int = 0,
    ) -> None:
        """Join by key.

        Args:
            images: the images of the data set.
            stores: caption kind -> its embeddings or tokens.
            targets: caption kind -> target facets.
            image_size: S.
            resize: of images of another size, a name of `flame.data.pixels.RESIZES`.
            max_skipped: share of images, or of captions of a kind, that may be left out.
            cache_bytes: decoded images are kept in memory if they fit.

        Raises:
            ValueError: a kind has no store, or too many images or captions would be left out.
        """
        missing = [kind for kind in targets if kind not in stores]
        if missing:
            raise ValueError(
                f"no embeddings of kind {missing[0]!r}; there are: {', '.join(stores)}"
            )
        self._images, self._size, self._resize = images, image_size, resize
        self._stores = {kind: stores[kind] for kind in targets}
        self.facets = [(kind, facet) for kind, facets in targets.items() for facet in facets]
        self.kinds = tuple(targets)
        self.skipped: dict[str, int] = {}
        self._max_skipped = max_skipped
        self._rows, self._captions = self._join()
        self.used, self.drawings = len(self._rows), images.drawings
        self.cached = self.drawings * self.used * 3 * image_size**2 <= cache_bytes
        self._pixels = self._decode_all() if self.cached else None

    @classmethod
    def of_run(
        cls,
        settings: Training,
        images: ImageReader,
        stores: Mapping[str, Texts],
        targets: Mapping[str, Sequence[str]],
        *,
        cache_bytes: int = 0,
    ) -> "Pairs":
        """Pairs as the settings of a run want them; arguments as above."""
        return cls(
            images,
            stores,
            targets,
            image_size=settings.backbone.image_size,
            resize=settings.recipe.resize,
            max_skipped=settings.max_skipped,
            cache_bytes=cache_bytes,
        )

    def item(
        self, chosen: np.ndarray, draws: np.ndarray, columns: Sequence[int], drawing: int = 0
    ) -> WorkItem:
        """Some images of a batch and their texts, to be read.

        Args:
            chosen: (n,) indices of pairs in [0, used).
            draws: (n, kinds) in [0, 1), which choose among an image's captions of a kind.
            columns: (K,) ascending indices of target facets.
            drawing: which image of each pair, in [0, drawings).
        """
        texts = []
        for number, (kind, store) in enumerate(self._stores.items()):
            wanted = [self.facets[c][1] for c in columns if self.facets[c][0] == kind]
            if wanted:
                rows, first = self._captions[kind]
                count = first[chosen + 1] - first[chosen]
                place = first[chosen] + (draws[:, number] * count).astype(np.int64)
                texts.append(store.request(rows[place], wanted))
        if self._pixels is not None:
            pixels = self._pixels[drawing]
            return WorkItem(partial(np.take, pixels, chosen, axis=0), tuple(texts))
        rows = self._rows[chosen]
        request = self._images.request(rows, self._size, self._resize, drawing)
        return WorkItem(request, tuple(texts))

    def _decode_all(self) -> np.ndarray:
        """Images (drawings, used, 3, S, S)."""
        out = np.empty((self.drawings, self.used, 3, self._size, self._size), np.uint8)
        for drawing, pixels in enumerate(out):
            for start in range(0, self.used, _DECODE):
                rows = self._rows[start : start + _DECODE]
                read = self._images.request(rows, self._size, self._resize, drawing)
                pixels[start : start + len(rows)] = read()
        return out

    def _join(self) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Image row of each pair; kind -> rows of its captions, as by `_ragged`."""
        images = pl.Series(self._images.keys, dtype=pl.String)
        owners = {kind: self._owners(kind, images) for kind in self._stores}
        used = np.ones(len(images), bool)
        for kind, (_, owner) in owners.items():
            has = np.zeros(len(images), bool)
            has[owner] = True
            self._count(f"images without {kind} caption", images.filter(~has), len(images))
            used &= has
        captions = {kind: _ragged(rows, owner, used) for kind, (rows, owner) in owners.items()}
        return np.flatnonzero(used).astype(np.uint32), captions

    def _owners(self, kind: str, images: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        """Captions of a kind that have an image, and the image of each, by row numbers."""
        keys = pl.Series(self._stores[kind].keys, dtype=pl.String)
        numbered = pl.DataFrame({"key": images}).with_row_index("image")
        owner = numbered["image"]
        if not keys.equals(images):  # else the join would take minutes at millions of rows
            table = pl.DataFrame({"key": keys})
            owner = table.join(numbered, on="key", how="left", maintain_order="left")["image"]
        orphans = keys.filter(owner.is_null())
        self._count(f"{kind} captions without image", orphans, len(keys))
        rows = np.flatnonzero(owner.is_not_null().to_numpy()).astype(np.uint32)
        return rows, owner.drop_nulls().to_numpy()

    def _count(self, reason: str, keys: pl.Series, total: int) -> None:
        self.skipped[reason] = len(keys)
        if len(keys) > self._max_skipped * total:
            raise ValueError(
                f"{len(keys)} of {total} {reason}, more than max_skipped {self._max_skipped};"
                f" the first: {', '.join(keys.unique(maintain_order=True).head(5))}"
            )


class Batches:
    """All batches of a training run, those of this process (a `Schedule`)."""

    def __init__(
        self,
        pairs: Pairs,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        facets_per_step: int | Literal["all"] = "all",
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Plan the epochs; the incomplete last batch of an epoch is dropped.

        Args:
            pairs: images and texts.
            batch_size: images per step, over all processes.
            epochs: number of passes over the pairs.
            seed: of all random choices.
            facets_per_step: number of target facets drawn at each step, the same for all images.
            rank: of this process.
            processes: number of processes.

        Raises:
            ValueError: the batch does not fit the pairs or the processes.
        """
        if batch_size > pairs.used:
            raise ValueError(f"batch_size {batch_size} is more than the {pairs.used} pairs")
        if batch_size % processes:
            raise ValueError(f"batch_size {batch_size} is not divisible by {processes} processes")
        num_facets = len(pairs.facets) if facets_per_step == "all" else facets_per_step
        if num_facets > len(pairs.facets):
            raise ValueError(
                f"facets_per_step {facets_per_step} is more than the {len(pairs.facets)} targets"
            )
        self.pairs, self.steps_per_epoch = pairs, pairs.used // batch_size
        self.facets: Sequence[tuple[str, str]] = pairs.facets
        self.cached = pairs.cached
        self.local_batch_size = batch_size // processes
        self._batch_size, self._epochs = batch_size, epochs
        self._seed, self._rank, self._processes = seed, rank, processes
        self._num_facets = num_facets

    def __len__(self) -> int:
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        """The batch at a step, read now."""
        return read(self, step)

    def item(self, step: int, rows: slice) -> WorkItem:
        """Some rows of the batch at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order, draws = _epoch(self._seed, epoch, self.pairs.used, len(self.pairs.kinds))
        mine = slice(
            place * self._batch_size + self._rank,
            (place + 1) * self._batch_size,
            self._processes,
        )
        chosen = order[mine][rows]
        drawing = epoch % self.pairs.drawings
        return self.pairs.item(chosen, draws[chosen], self.columns(step).tolist(), drawing)

    def columns(self, step: int) -> Tensor:
        """Facets drawn at a step, (K,) int64, ascending."""
        draw = generator("facets", self._seed, step)
        drawn = torch.randperm(len(self.facets), generator=draw)
        return drawn[: self._num_facets].sort().values


@lru_cache(maxsize=1)
def _epoch(seed: int, epoch: int, pairs: int, kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of the pairs in an epoch (pairs,), and the draws of captions (pairs, kinds)."""
    order = torch.randperm(pairs, generator=generator("order", seed, epoch))
    # In float64 a draw just below 1 times a count still rounds to less than the count.
    draws = torch.rand(
        pairs, kinds, generator=generator("captions", seed, epoch), dtype=torch.float64
    )
    return order.numpy(), draws.numpy()


def _ragged(rows: np.ndarray, owner: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Caption rows of each image in use, one image after the other, and N + 1 offsets in them.

    Args:
        rows: ascending numbers of captions.
        owner: image of each.
        used: whether an image is in use.
    """
    order = np.argsort(owner, kind="stable")
    order = order[used[owner[order]]]
    counts = np.bincount(owner, minlength=len(used))[used]
    return rows[order], np.concatenate([[0], counts.cumsum()])
