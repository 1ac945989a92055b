"""Images -> long and short captions by a multimodal LLM, in parts; parts -> one table, a report."""

import json
from pathlib import Path

import torch

from flame.captioning import engines, published, report
from flame.captioning.describe import describe_part
from flame.captioning.join import (
    check_missing,
    inputs,
    kinds,
    ordered,
    without_caption,
    write_table,
)
from flame.captioning.parts import PART, merge_chunks, total_counts
from flame.data.captions import CHECKSUMS, FILE, add_checksums
from flame.runtime import command
from flame.runtime.checksums import digest, seal, sha256
from flame.runtime.resumable import resumable, write_atomic
from flame.study.schema.data import PublishedCaptions
from flame.study.settings import CaptionSettings, CaptionsSettings

CHUNK = 256  # images of a file; an interruption loses those of the files that are not complete


def write(
    images: Path,
    out: Path,
    settings: CaptionSettings,
    *,
    threads: int | None = None,
    workers: int = 1,
    chunk: int = CHUNK,
) -> None:
    """Caption one part of the images of a data set; an interrupted job resumes.

    Args:
        images: folder of the data set.
        out: Parquet file to write, one row (key, kind, text, flags) per caption.
        settings: captioner, prompts, and which part of the images.
        threads: CPU threads of PyTorch; all by default.
        workers: threads that decode images ahead of the engine.
        chunk: images that are written together.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    engine = settings.captioner.engine
    origin = settings.model_dump(mode="json") | {
        "inputs": inputs(images),
        "made_with": {} if engine == "published" else engines.versions(engine),
        "chunk": chunk,
    }
    with resumable(out, origin, file=PART) as folder:
        if isinstance(settings.captioner, PublishedCaptions):
            counts = published.adopt(settings.captioner, images, folder)
        else:
            describe_part(settings.captioner, images, folder, settings, chunk, workers)
            counts = total_counts(folder)
        merge_chunks(folder, origin | counts)


def join(images: Path, parts: list[Path], out: Path, settings: CaptionsSettings) -> None:
    """Join the captions of all parts with those of the data set, and report on them.

    Args:
        images: folder of the data set.
        parts: every file that `write` made for it, in any order.
        out: folder to write: `captions.parquet`, `report.json`, `report.md`.
        settings: captioner, and the share of images that may have no caption.
    """
    about = ordered(parts, images, settings)
    origin = settings.model_dump(mode="json") | {
        "inputs": {str(i): sha256(path) for i, path in enumerate(about)},
        "own": digest(images / FILE),
    }
    with resumable(out, origin) as folder:
        captions = folder / FILE
        written = write_table([*about], images, captions, settings)
        missing = {kind: without_caption(images, written, kind) for kind in kinds(settings)}
        found = report.summarize(captions, written, [*about.values()], missing, settings)
        write_atomic(folder / "report.json", json.dumps(found, indent=1).encode())
        write_atomic(folder / "report.md", report.as_markdown(found).encode())
        add_checksums(captions)
        seal(folder, [FILE, CHECKSUMS, "report.json", "report.md"])
        check_missing(missing, found["images"], settings)


if __name__ == "__main__":
    command.main({"write": write, "join": join})
