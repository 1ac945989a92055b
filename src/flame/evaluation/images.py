"""Features of the images of data sets: each image set is decoded once a job, and not kept for ever.

Data sets that differ in their texts only, such as ImageNet in five languages, hold the same images;
the checksums in their indices tell.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame.data.images import ImageReader
from flame.evaluation.decoding import Decoder
from flame.evaluation.forward import Precision, image_features
from flame.evaluation.tasks import Images
from flame.runtime import progress
from flame.runtime.errors import known
from flame.study.settings import Question
from flame.towers.base import Tower

CACHE_BYTES = 2 << 30

PROJECTED = "projected"  # features in the space of the texts
VISUAL = "visual"  # features of the backbone, for probes


class ImageFeatures:
    """Features of image sets by one tower, computed on first use.

    Features of the sets used last are kept in memory, up to `CACHE_BYTES`, and always those of the
    last one: I x d x 4 bytes each.
    """

    def __init__(
        self,
        tower: Tower,
        folders: Mapping[str, Path],
        questions: Sequence[Question],
        decoder: Decoder,
        *,
        batch_size: int,
        device: torch.device,
        precision: Precision,
        title: str,
    ) -> None:
        """Keep the inputs; nothing is computed yet.

        Args:
            tower: a tower, on the device.
            folders: data set -> its folder.
            questions: all questions of the job: where several want features of one image set, a
                single pass over its images gives them all.
            decoder: of the images.
            batch_size: images per forward pass.
            device: of the tower.
            precision: of the forward passes.
            title: of the job, for the progress bar.
        """
        self._tower, self._folders, self._decoder = tower, folders, decoder
        self._batch_size, self._device, self._precision = batch_size, device, precision
        self._title = title
        self._readers: dict[str, ImageReader] = {}
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._encoders: dict[str, Callable[[Tensor], Tensor]] = {
            PROJECTED: tower.encode_image,
            VISUAL: partial(backbone_features, tower),
        }
        self._uses = [use for question in questions for use in _uses(question)]

    def of(self, dataset: str, kind: str) -> Images:
        """Images of a data set with their features.

        Args:
            dataset: name of the data set.
            kind: `PROJECTED` or `VISUAL`.

        Raises:
            ValueError: the job has no such data set.
        """
        reader = self._reader(dataset)
        key = self._set(dataset), kind
        if key not in self._kept:
            self._compute(dataset, kind)
        self._kept.move_to_end(key)
        return Images(reader.keys.to_list(), reader.labels, self._kept[key])

    def _compute(self, dataset: str, kind: str) -> None:
        """Compute features of a kind, and those of other kinds that questions will ask for."""
        reader, images = self._reader(dataset), self._set(dataset)
        also = {k for name, k in self._uses if name in self._folders and self._set(name) == images}
        missing = [k for k in self._encoders if k == kind or k in also]
        missing = [k for k in missing if (images, k) not in self._kept]
        batches = self._decoder.batches(
            reader,
            range(len(reader)),
            self._tower.image_size,
            self._tower.resize,
            self._batch_size,
        )
        with progress.bar(len(reader), "images", f"{self._title}, {dataset}") as bar:
            found = image_features(
                [self._encoders[k] for k in missing],
                _counted(batches, bar.update),
                len(reader),
                self._device,
                self._precision,
            )
        self._kept.update({(images, k): each for k, each in zip(missing, found, strict=True)})
        self._kept.move_to_end((images, kind))
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > CACHE_BYTES:
            self._kept.popitem(last=False)

    def _reader(self, dataset: str) -> ImageReader:
        if dataset not in self._folders:
            raise ValueError(f"no data set {known(dataset, self._folders)}")
        if dataset not in self._readers:
            self._readers[dataset] = ImageReader(self._folders[dataset])
        return self._readers[dataset]

    def _set(self, dataset: str) -> str:
        """What data sets of the same images have in common."""
        return self._reader(dataset).digest or str(self._folders[dataset])


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


def _uses(question: Question) -> Iterator[tuple[str, str]]:
    """Data sets that a question needs features of, and the kind of each."""
    if question.train is None:
        yield question.dataset, PROJECTED
        return
    yield question.dataset, VISUAL
    yield question.train, VISUAL


def _counted(batches: Iterable[Tensor], on_batch: Callable[[int], Any]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        on_batch(len(batch))


def _bytes(features: Tensor) -> int:
    return features.numel() * features.element_size()
