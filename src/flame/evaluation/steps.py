"""Training steps timed against their alternatives: CLIP's, and FLAME's with the LLM in each step.

A step is timed on batches that were read, decoded and tokenized before the clock starts, and lie in
pinned memory if there is a GPU: the threads that read ahead count on no side. What is read ahead
are at most `AHEAD_BYTES` a training, which its steps use in turn; what a step costs does not depend
on the pixels.

Shapes: n captions, K facets, D width of the LLM; B images of a batch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flame.data import captions
from flame.data.images import ImageReader
from flame.embedding.llm import FrozenLLM
from flame.embedding.store import Embeddings, by_kind
from flame.evaluation.overhead import Way, captions_of
from flame.runtime.requests import Request
from flame.study.settings import ClipTraining, EmbedSettings, FlameTraining, OverheadSettings
from flame.towers.base import Centers, Tower
from flame.towers.load import create
from flame.training.batches import Batch, Schedule
from flame.training.loader import loader
from flame.training.memory import STATE_BYTES, settle
from flame.training.pairs import Batches, Pairs, Texts
from flame.training.processes import Place
from flame.training.speed import DEFAULT, Speed
from flame.training.tokens import FACET, Tokens
from flame.training.trainer import Trainer

log = logging.getLogger(__name__)

ONLINE = 20  # steps on stored embeddings for each step with the LLM, which is that much slower
AHEAD_BYTES = 1 << 30


class OnlineTexts:
    """Captions that the frozen LLM embeds during training, in place of a store."""

    def __init__(self, encoder: FrozenLLM, store: Embeddings, images: Path) -> None:
        """Replace a store.

        Args:
            encoder: the LLM that made the store.
            store: its attributes name the captions and the prompt.
            images: folder of the data set.
        """
        made = {name: store.attributes[name] for name in EmbedSettings.model_fields}
        self._encoder, self._settings = encoder, EmbedSettings.model_validate(made)
        rows = captions_of(images, self._settings)
        self.keys, self._texts = rows["key"], rows["text"]

    def request(self, indices: np.ndarray, facets: Sequence[str]) -> Request:
        """A call that embeds the given rows and facets, in this process only."""
        return partial(self.rows, indices, facets)

    def rows(self, indices: np.ndarray, facets: Sequence[str]) -> np.ndarray:
        """Embeddings (n, K, D) float16 of the given rows and facets, batch by batch."""
        texts, _ = self._encoder.prepare(self._texts.gather(indices).to_list())
        suffixes = [self._settings.facets[facet] for facet in facets]
        return self._encoder.embed(texts, self._settings.prefix, suffixes).half().numpy()


class Run(NamedTuple):
    """A training, some steps of which are timed."""

    settings: FlameTraining | ClipTraining
    texts: Mapping[str, Texts]
    targets: Mapping[str, Sequence[str]]
    centers: Centers
    steps: int


def runs(
    images: Path, stores: Sequence[Path], encoder: FrozenLLM, settings: OverheadSettings
) -> dict[str, Run]:
    """FLAME on stored embeddings, CLIP with its text tower, FLAME with the LLM in the loop.

    Raises:
        ValueError: the batch sizes differ.
    """
    steps, flame, baseline = settings.overhead.steps, settings.flame, settings.clip
    sizes = flame.recipe.batch_size, baseline.recipe.batch_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"steps of {sizes[0]} and {sizes[1]} images are not comparable")
    stored = {
        kind: Embeddings.open(parts, flame.dataset) for kind, parts in by_kind(stores).items()
    }
    online = {kind: OnlineTexts(encoder, store, images) for kind, store in stored.items()}
    centers: Centers = {}
    if flame.recipe.standardize == "center":
        means = {kind: torch.from_numpy(store.mean()) for kind, store in stored.items()}
        centers = {k: dict(zip(stored[k].facets, mean, strict=True)) for k, mean in means.items()}
    length = baseline.text_tower.context_length
    tokens = Tokens(images / captions.FILE, baseline.captions, length)
    words = {baseline.captions: (FACET,)}
    return {
        "flame": Run(flame, stored, flame.targets, centers, steps),
        "clip": Run(baseline, {baseline.captions: tokens}, words, {}, steps),
        "online": Run(flame, online, flame.targets, centers, max(1, steps // ONLINE)),
    }


def training_ways(
    timed: Mapping[str, Run],
    images: Path,
    encoder: FrozenLLM,
    folder: Path,
    *,
    speed: Speed = DEFAULT,
    workers: int = 0,
) -> dict[str, Way]:
    """Steps as `flame.train` takes them, after an untimed one if there are several.

    Args:
        timed: the trainings, as by `runs`.
        images: folder of the data set.
        encoder: gives the width of the embeddings and the device.
        folder: where the trainers would write checkpoints.
        speed: of all trainings.
        workers: processes that read ahead.

    Raises:
        ValueError: a GPU is too small for them.
    """
    reader, place = ImageReader(images), Place(0, 1, encoder.device)
    towers = {name: _tower(run, encoder.dim) for name, run in timed.items()}
    schedules = {name: _schedule(run, reader) for name, run in timed.items()}
    speeds = _settled(timed, towers, schedules, place, speed)
    ahead = {
        name: read_ahead(schedules[name], timed[name].steps, workers, place)
        for name in ("flame", "clip")
    }
    ahead["online"] = ahead["flame"]  # of the same images
    ways = {}
    for name, run in timed.items():
        trainer = Trainer(
            towers[name], schedules[name], run.settings, folder / name, place, speeds[name]
        )
        chosen = trainer.speed.micro_batch, trainer.speed.grad_checkpointing
        log.info("%s: micro-batches of %s images, checkpointing %s", name, *chosen)
        batch = partial(_batch, ahead[name], schedules["online"] if name == "online" else None)
        ways[name] = _way(trainer, batch, run.steps)
    return ways


def read_ahead(schedule: Schedule, steps: int, workers: int, place: Place) -> list[Batch]:
    """The first batches of a schedule: one, and as many as `steps` needs and memory holds."""
    with loader(schedule, workers=workers, pin_memory=place.device.type == "cuda") as batches:
        following = iter(batches)
        first = next(following)
        room = AHEAD_BYTES // sum(tensor.nbytes for tensor in first)
        return [first, *islice(following, max(0, min(steps, room) - 1))]


def _batch(ahead: Sequence[Batch], online: Schedule | None, step: int) -> Batch:
    """Batch of a step, whose texts the LLM embeds now if it is online."""
    number = step % len(ahead)
    batch = ahead[number]
    if online is None:
        return batch
    requests = online.item(number, slice(0, online.local_batch_size)).texts
    texts = np.concatenate([request() for request in requests], axis=1)
    return batch._replace(texts=torch.from_numpy(texts))


def _way(trainer: Trainer, batch: Callable[[int], Batch], steps: int) -> Way:
    def train(count: int) -> None:
        for _ in range(count):  # without the logging and progress bar of `Trainer.run`
            trainer.advance(batch(trainer.step))

    if steps > 1:
        train(1)
    return Way(lambda: train(steps), steps)


def _schedule(run: Run, reader: ImageReader) -> Batches:
    settings, recipe = run.settings, run.settings.recipe
    pairs = Pairs.of_run(settings, reader, run.texts, run.targets)
    return Batches(
        pairs,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,  # steps past the last epoch are like those before
        seed=settings.seed,
        facets_per_step=recipe.facets_per_step if settings.method == "flame" else "all",
    )


def _tower(run: Run, width: int) -> Tower:
    torch.manual_seed(run.settings.seed)
    tower = create(run.settings, width)
    tower.centers = dict(run.centers)
    return tower


def _settled(
    timed: Mapping[str, Run],
    towers: Mapping[str, Tower],
    schedules: Mapping[str, Schedule],
    place: Place,
    speed: Speed,
) -> dict[str, Speed]:
    """Speed settings with which each training fits a GPU beside the LLM and the others."""
    parameters = sum(each.numel() for tower in towers.values() for each in tower.parameters())
    with _reserved(STATE_BYTES * parameters, place.device):
        return {
            name: settle(speed, towers[name], run.settings, schedules[name].facets, place)
            for name, run in timed.items()
        }


@contextmanager
def _reserved(size: int, device: torch.device) -> Iterator[None]:
    """Hold so many bytes of a GPU in this block; nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    try:
        held = torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has no room for {size / 1e9:.1f} GB of weights and optimizers of the timed "
            f"trainings beside the LLM: {str(error).splitlines()[0]}"
        ) from error
    yield
    del held
