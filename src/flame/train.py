"""Images and stored caption embeddings -> a visual tower aligned with the frozen LLM."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import zarr
from torch import distributed as dist
from torch.utils.data import DataLoader

from flame import __version__, command, curve, model
from flame.config import TrainSettings
from flame.images import ImageReader
from flame.model import FlameTower
from flame.pairs import Batches, Pairs
from flame.partial import partial, sha256
from flame.store import Embeddings, by_kind
from flame.trainer import Place, Trainer

log = logging.getLogger(__name__)


def train(
    images: Path,
    stores: list[Path],
    out: Path,
    settings: TrainSettings,
    threads: int = 1,
    workers: int = 0,
    cache_mb: int = 2048,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Train one run; under `torchrun`, in as many processes as it starts.

    An interrupted run goes on from its last checkpoint in `<out>.partial`, and on a CPU ends in
    the same bytes as one that was never interrupted.

    Args:
        images: folder of the data set.
        stores: embedding stores of its captions, every part of every kind.
        out: folder to write: model.safetensors, run.json, log.jsonl, loss.png.
        settings: the run.
        threads: CPU threads of each process.
        workers: processes that read ahead, where images are not kept in memory.
        cache_mb: images, and embeddings of a kind, are kept in memory if they fit into this, MiB.
        device: where to compute; auto: on the GPU if there is one.
    """
    torch.set_num_threads(threads)
    recipe = settings.recipe
    found = {path: zarr.open_group(path, mode="r").attrs.asdict() for path in stores}
    opened = {
        kind: Embeddings.open(parts, settings.dataset, cache_bytes=cache_mb << 20)
        for kind, parts in by_kind(stores).items()
    }
    pairs = Pairs(
        ImageReader(images),
        opened,
        settings.targets,
        image_size=settings.backbone.image_size,
        max_skipped=settings.max_skipped,
        cache_bytes=cache_mb << 20,
    )
    fingerprint = {
        "settings": settings.model_dump(mode="json"),
        "stores": [found[path] for path in sorted(found)],
        "images": sha256(images / "manifest.json"),
    }
    with _processes(device) as place, _output(out, fingerprint, place) as folder:
        batches = Batches(
            pairs,
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            seed=settings.seed,
            facets_per_step=recipe.facets_per_step,
            rank=place.rank,
            processes=place.processes,
        )
        torch.manual_seed(settings.seed)
        tower = FlameTower(settings.backbone, recipe, next(iter(opened.values())).dim)
        if recipe.standardize == "center":
            tower.centers = {kind: _means(store) for kind, store in opened.items()}
        training = Trainer(tower, batches, settings, folder, place)
        log.info("%d pairs; skipped: %s", pairs.used, pairs.skipped)
        if training.step:
            log.info("going on from step %d of %d", training.step, len(batches))
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=range(training.step, len(batches)),
            num_workers=0 if pairs.cached else workers,
            # Zarr runs a thread, and a child forked beside a thread may hang.
            multiprocessing_context="spawn" if workers and not pairs.cached else None,
            pin_memory=place.device.type == "cuda",
        )
        training.run(loader)
        if place.rank == 0:
            _finish(training, pairs)


def _means(store: Embeddings) -> dict[str, torch.Tensor]:
    return dict(zip(store.facets, torch.from_numpy(store.mean()), strict=True))


@contextmanager
def _processes(device: str) -> Iterator[Place]:
    """This process among those that `torchrun` started, or alone."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if "WORLD_SIZE" not in os.environ:
        yield Place(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    own = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


@contextmanager
def _output(out: Path, fingerprint: Mapping[str, Any], place: Place) -> Iterator[Path]:
    """Folder that becomes `out`: the first process holds it, the others are told where it is."""
    with partial(out, fingerprint) if place.rank == 0 else nullcontext() as folder:
        shared: list[Any] = [folder]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        yield shared[0]


def _finish(training: Trainer, pairs: Pairs) -> None:
    record = {
        "settings": training.settings.model_dump(mode="json"),
        "dim": training.tower.dim,
        "pairs": {"used": pairs.used, "skipped": pairs.skipped},
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "loss": training.loss,
        "versions": {"flame": __version__} | {name: version(name) for name in ("torch", "timm")},
    }
    model.save(training.tower, training.folder, record)
    curve.draw(
        training.folder / "log.jsonl",
        training.folder / "loss.png",
        training.settings.run,
    )
    training.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    command.main(train)
