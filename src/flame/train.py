"""Images and captions -> a tower: FLAME trains on stored embeddings, baselines on the captions."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from flame import __version__
from flame.data.captions import FILE
from flame.data.images import ImageReader
from flame.embedding import provenance
from flame.embedding.store import Embeddings, by_kind, read_attributes
from flame.runtime import command
from flame.runtime.checksums import digest, sha256
from flame.runtime.resumable import resumable
from flame.study.settings import ClipTraining, FlameTraining, LongClipTraining, Training
from flame.towers.load import create, load, save
from flame.training import curve, memory, processes
from flame.training.loader import loader
from flame.training.monitor import NOTHING, Monitor, Monitoring
from flame.training.pairs import Batches, Pairs, Texts
from flame.training.processes import Place
from flame.training.speed import DEFAULT, Speed
from flame.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(
    images: Path,
    out: Path,
    settings: Training,
    stores: tuple[Path, ...] = (),
    captions: Path | None = None,
    base: Path | None = None,
    threads: int = 1,
    workers: int = 0,
    cache_mb: int = 2048,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    speed: Speed = DEFAULT,
    monitoring: Monitoring = NOTHING,
) -> None:
    """Train one run; under `torchrun`, in several processes.

    An interrupted run resumes from its last checkpoint in `<out>.partial`. On a CPU it then ends
    in the same bytes as an uninterrupted run.

    Args:
        images: folder of the data set.
        out: folder to write: model.safetensors, run.json, log.jsonl, loss.png.
        settings: the run.
        stores: embedding stores of its captions, every part of every kind; for FLAME.
        captions: folder of a captioner's captions, for a baseline that does not read those of the
            data set.
        base: folder of the CLIP run to start from; for Long-CLIP.
        threads: CPU threads per process.
        workers: processes that prefetch images that are not kept in memory.
        cache_mb: images, and texts of a kind, are kept in memory if they fit into this many MiB.
        device: where to compute; auto: on the GPU if there is one.
        speed: micro-batches, gradient checkpointing and compilation.
        monitoring: validation, kept weights and a profile.
    """
    torch.set_num_threads(threads)
    words = (captions or images) / FILE
    inputs = sources(settings, images, stores, words, base)
    fingerprint = {"settings": settings.model_dump(mode="json")} | inputs
    with processes.joined(device) as place:
        torch.manual_seed(settings.seed)
        tower, targets = create(settings, _width(settings, stores)), _targets(settings)
        facets = [(kind, facet) for kind, names in targets.items() for facet in names]
        # A batch that does not fit the GPU is refused before hours of reading, not after.
        speed = memory.settle(speed, tower, settings, facets, place)
        texts = _texts(settings, words, stores, cache_mb << 20)
        reader, cache_bytes = ImageReader(images), cache_mb << 20
        pairs = Pairs.of_run(settings, reader, texts, targets, cache_bytes=cache_bytes)
        about = _about(settings, pairs, texts)
        with _output(out, fingerprint, place) as folder:
            _start(tower, settings, texts, base)
            batches = _batches(pairs, settings, place)
            training = Trainer(tower, batches, settings, folder, place, speed)
            _announce(training, pairs)
            pin = place.device.type == "cuda"
            with loader(batches, first=training.step, workers=workers, pin_memory=pin) as ahead:
                training.run(ahead, _monitor(monitoring, training, about))
            _finish(training, about)


def sources(
    settings: Training, images: Path, stores: Sequence[Path], words: Path, base: Path | None
) -> dict[str, Any]:
    """Inputs that determine the result besides the settings, for the fingerprint.

    Raises:
        ValueError: an input is missing that the method needs, or given that it does not take.
    """
    wanted = {
        "stores": isinstance(settings, FlameTraining),
        "base": isinstance(settings, LongClipTraining),
    }
    for name, given in {"stores": bool(stores), "base": base is not None}.items():
        if given != wanted[name]:
            needs = "needs" if wanted[name] else "takes no"
            raise ValueError(f"method {settings.method!r} {needs} --{name}")
    found: dict[str, Any] = {"images": sha256(images / "manifest.json")}
    if stores:
        found["stores"] = [read_attributes(path) for path in sorted(stores)]
    else:
        found["captions"] = digest(words)
    if base is not None:
        found["base"] = sha256(base / "model.safetensors")
    return found


def _width(settings: Training, stores: Sequence[Path]) -> int | None:
    """Width of the text embeddings of FLAME."""
    if not isinstance(settings, FlameTraining):
        return None
    parts = next(iter(by_kind(stores).values()))
    return Embeddings.open(parts, settings.dataset).dim


def _targets(settings: Training) -> Mapping[str, Sequence[str]]:
    """Target facets of each caption kind."""
    if isinstance(settings, FlameTraining):
        return settings.targets
    # Imported here because open_clip takes seconds to import.
    from flame.training.tokens import FACET

    if isinstance(settings, ClipTraining):
        return {settings.captions: (FACET,)}
    return {settings.long: (FACET,), settings.short: (FACET,)}


def _texts(
    settings: Training, words: Path, stores: Sequence[Path], cache_bytes: int
) -> Mapping[str, Texts]:
    """Embeddings or tokens of each caption kind."""
    if isinstance(settings, FlameTraining):
        opened = {
            kind: Embeddings.open(parts, settings.dataset, cache_bytes=cache_bytes)
            for kind, parts in by_kind(stores).items()
        }
        provenance.describe(opened, settings.targets)  # fails before hours of training, not after
        return opened
    # Imported here because open_clip takes seconds to import.
    from flame.training.tokens import Tokens

    length = settings.text_tower.context_length
    if isinstance(settings, LongClipTraining):
        length = settings.context_length
    return {
        kind: Tokens(words, kind, length, cache_bytes=cache_bytes) for kind in _targets(settings)
    }


def _start(tower: Any, settings: Training, texts: Mapping[str, Texts], base: Path | None) -> None:
    """Prepare an untrained tower for its first step."""
    if isinstance(settings, FlameTraining) and settings.recipe.standardize == "center":
        tower.centers = {kind: _means(store) for kind, store in _stores(texts).items()}
    if base is not None:
        _start_from(tower, base)


def _start_from(tower: Any, base: Path) -> None:
    """Load the CLIP in the folder `base` into a Long-CLIP."""
    clip, record = load(base)
    try:
        tower.start_from(clip.state_dict(), record["settings"])
    except ValueError as error:
        raise ValueError(f"{base}: {error}") from error


def _stores(texts: Mapping[str, Texts]) -> dict[str, Embeddings]:
    return {kind: store for kind, store in texts.items() if isinstance(store, Embeddings)}


def _means(store: Embeddings) -> dict[str, torch.Tensor]:
    return dict(zip(store.facets, torch.from_numpy(store.mean()), strict=True))


def _batches(pairs: Pairs, settings: Training, place: Place) -> Batches:
    recipe = settings.recipe
    return Batches(
        pairs,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        seed=settings.seed,
        facets_per_step=recipe.facets_per_step,
        rank=place.rank,
        processes=place.processes,
    )


@contextmanager
def _output(out: Path, fingerprint: Mapping[str, Any], place: Place) -> Iterator[Path]:
    """Folder that becomes `out`: the first process opens it and tells the others its path."""
    with ExitStack() as held:
        folder: Path | OSError | None = None
        if place.rank == 0:
            try:
                folder = held.enter_context(resumable(out, fingerprint))
            except OSError as error:  # passed on, or the others would wait forever
                folder = error
        folder = processes.from_first(folder)
        if isinstance(folder, OSError):
            raise folder
        yield folder


def _announce(training: Trainer, pairs: Pairs) -> None:
    if training.place.rank != 0:
        return
    log.info("%d pairs; skipped: %s", pairs.used, pairs.skipped)
    speed = training.speed
    log.info(
        "micro-batches of %s images, grad_checkpointing %s, compile %s",
        *(speed.micro_batch, speed.grad_checkpointing, speed.compile),
    )
    if training.step:
        log.info("resuming from step %d of %d", training.step, len(training.batches))


def _about(settings: Training, pairs: Pairs, texts: Mapping[str, Texts]) -> dict[str, Any]:
    """What the record of a run says of its data."""
    about: dict[str, Any] = {"pairs": {"used": pairs.used, "skipped": pairs.skipped}}
    if isinstance(settings, FlameTraining):
        about["texts"] = provenance.describe(_stores(texts), settings.targets)
    return about


def _monitor(asked: Monitoring, training: Trainer, about: Mapping[str, Any]) -> Monitor:
    validate = None
    if asked.validation.questions:
        # Imported here because most trainings validate nothing.
        from flame.evaluation.validation import Validation

        validate = Validation(
            training.result,
            asked.validation,
            asked.validation_datasets,
            asked.validation_stores,
            place=training.place,
            bfloat16=training.bfloat16,
            compiled=training.speed.compile != "none",
            trained=about.get("texts"),
        )
    return Monitor(
        training.folder,
        training.batches,
        training.place,
        validate=validate,
        every=asked.validation.every,
        save=lambda folder: _save(training, folder, about),
        keep_epochs=asked.keep_epochs,
        profile_steps=asked.profile_steps,
    )


def _save(training: Trainer, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the tower as it is, with its record."""
    record: dict[str, Any] = {
        "settings": training.settings.model_dump(mode="json"),
        "dim": training.tower.dim,
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "loss": training.loss,
        "versions": {"flame": __version__} | {name: version(name) for name in ("torch", "timm")},
    }
    save(training.result, folder, {**record, **about})


def _finish(training: Trainer, about: Mapping[str, Any]) -> None:
    if training.place.rank != 0:
        return
    _save(training, training.folder, about)
    curve.draw(
        training.folder / "log.jsonl",
        training.folder / "loss.png",
        training.settings.run,
    )
    training.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    command.main(train)
