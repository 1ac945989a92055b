"""Benchmarks of a tower that is being trained, a few times during its training.

All processes share the images: each decodes its part once, keeps the pixels, and encodes them each
time. So no process waits long for another, and a collective's timeout is far away. Metrics are
computed by the first process. The tower is in evaluation mode meanwhile, without gradients, and
nothing is drawn: its training goes on as if nothing had been.

Shapes: I images of a data set, n of this process, S pixels, d width of the features.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from flame.data.images import ImageReader
from flame.evaluation import tasks
from flame.evaluation.features import Features
from flame.evaluation.forward import Precision, image_features
from flame.evaluation.tasks import Images
from flame.runtime.errors import known
from flame.study.settings import Question, ValidationSettings
from flame.towers.base import Tower
from flame.training import processes
from flame.training.processes import Place

BATCH_SIZE = 256
DECODED = 32  # images that a thread decodes at a time


class Validation:
    """Evaluates a tower on the questions of a validation, as often as it is called."""

    def __init__(
        self,
        tower: Tower,
        settings: ValidationSettings,
        datasets: Sequence[Path],
        stores: Sequence[Path],
        *,
        place: Place,
        bfloat16: bool,
        compiled: bool = False,
        trained: Mapping[str, Any] | None,
    ) -> None:
        """Decode the images of this process.

        Args:
            tower: the tower that is trained, on its device.
            settings: the questions.
            datasets: folders of their data sets.
            stores: embedding stores of their texts; none for a tower that encodes texts itself.
            place: of this process.
            bfloat16: whether the tower's forward passes are in bfloat16, as in training.
            compiled: whether the backbone is compiled. A validation runs it as it is: compiling it
                once more, for other batches and without gradients, would take minutes.
            trained: how the training texts were embedded; see `Features`.

        Raises:
            ValueError: a data set or a store is missing.
        """
        self._tower, self._questions, self._place = tower, settings.questions, place
        self._compiled = compiled
        self._precision: Precision = "bfloat16" if bfloat16 else "float32"
        self._features = Features(
            tower,
            datasets,
            stores,
            BATCH_SIZE,
            "validate",
            trained,
            precision=self._precision,
            device=place.device,
        )
        folders = {path.name: path for path in datasets}
        self._sets: dict[str, _Pixels] = {}
        for name in dict.fromkeys(question.dataset for question in settings.questions):
            if name not in folders:
                raise ValueError(f"validation: no data set {known(name, folders)}")
            self._sets[name] = _Pixels(folders[name], tower, settings.images, place)

    def __call__(self) -> dict[str, dict[str, float]]:
        """Benchmark -> metric -> percent in the first process, nothing in the others."""
        with evaluating(self._tower), _eager(self._compiled):
            return {question.name: self._answer(question) for question in self._questions}

    def _answer(self, question: Question) -> dict[str, float]:
        images = self._images(question.dataset)
        if self._place.rank != 0:
            return {}
        asked = dataclasses.replace(self._features.asked(question), images=lambda: images)
        answer = tasks.answer(asked)
        return {
            name: round(100 * metric.hit.double().mean().item(), 4)
            for name, metric in answer.metrics.items()
        }

    @torch.inference_mode()
    def _images(self, dataset: str) -> Images:
        pixels, device = self._sets[dataset], self._place.device
        batches, encode = pixels.own.split(BATCH_SIZE), self._tower.encode_image
        (own,) = image_features([encode], batches, len(pixels.own), device, self._precision)
        # Image i of process r is image r + i P of the data set.
        ranks = processes.gather(own.to(device)).unflatten(0, (self._place.processes, -1))
        features = ranks.transpose(0, 1).flatten(0, 1)[: len(pixels.keys)].cpu()
        return Images(pixels.keys, pixels.labels, features)


class _Pixels:
    """Decoded images of a data set, shared by the processes.

    Attributes:
        keys, labels: of all I images.
        own: (n, 3, S, S) uint8, those of this process; n is the same in all processes.
    """

    def __init__(self, folder: Path, tower: Tower, images: int | None, place: Place) -> None:
        reader = ImageReader(folder)
        count = min(images or len(reader), len(reader))
        rows = [i * len(reader) // count for i in range(count)]  # evenly spread
        self.keys = [reader.keys[row] for row in rows]
        self.labels = [reader.labels[row] for row in rows]
        padding = rows[:1] * (-count % place.processes)
        own = (rows + padding)[place.rank :: place.processes]
        blocks = [own[i : i + DECODED] for i in range(0, len(own), DECODED)]
        load = partial(reader.load, size=tower.image_size, resize=tower.resize)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # PIL decodes without the GIL
            self.own: Tensor = torch.cat(list(pool.map(load, blocks)))


def _eager(compiled: bool) -> AbstractContextManager[object]:
    """Compiled modules run as they were before, in this block."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def evaluating(tower: Tower) -> Iterator[None]:
    """A tower in evaluation mode, the same in all processes; then in training mode again."""
    if dist.is_initialized():
        # As `DistributedDataParallel` does before each forward pass.
        for buffer in tower.buffers():
            dist.broadcast(buffer, 0)
    tower.eval()
    try:
        yield
    finally:
        tower.train()
