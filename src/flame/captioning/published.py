"""Captions that others published on the hub, joined to the images of a data set by key."""

import glob
import logging
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from flame.captioning.faults import faults
from flame.captioning.parts import Row, chunk_path, write_chunk
from flame.data import hub
from flame.data.json_objects import read_objects
from flame.runtime import progress
from flame.runtime.checksums import verified
from flame.study.schema.data import PublishedCaptions

log = logging.getLogger(__name__)

CHUNK = 65_536  # captions


def adopt(captioner: PublishedCaptions, images: Path, folder: Path) -> dict[str, float]:
    """Write the published captions of a data set's images as chunks, unchanged.

    Args:
        captioner: where the captions are published.
        images: folder of the data set.
        folder: where chunks are written.

    Returns:
        Number of images, of captions of unknown images, and of second captions of an image.
    """
    keys = set(pl.read_parquet(verified(images / "index.parquet"), columns=["key"])["key"])
    counts = {"unknown": 0, "double": 0}
    with progress.bar(len(keys) * len(captioner.files), "captions", "published") as bar:
        rows: list[Row] = []
        number = 0
        for row in _matching(captioner, keys, folder, counts):
            rows.append(row)
            bar.update()
            if len(rows) == CHUNK:
                write_chunk(chunk_path(folder, number), rows)
                rows, number = [], number + 1
        write_chunk(chunk_path(folder, number), rows)
    if any(counts.values()):
        log.info("captions of unknown images: %(unknown)d; duplicates: %(double)d", counts)
    return {"images": len(keys), "broken": 0, **counts}


def _matching(
    captioner: PublishedCaptions, keys: set[str], folder: Path, counts: dict[str, int]
) -> Iterator[Row]:
    """One row per known key and kind, in the order of the published files; others are counted."""
    for kind, name in captioner.files.items():
        place = (captioner.id, captioner.revision)
        file = hub.download(*place, [glob.escape(name)], folder / "hub") / name
        seen: set[str] = set()
        for number, found in enumerate(read_objects(file)):
            if captioner.key not in found or captioner.text not in found:
                raise ValueError(
                    f"object {number} of {name} in {captioner.id!r} has no {captioner.key!r} or no "
                    f"{captioner.text!r}, but: {', '.join(found)}"
                )
            key, text = str(found[captioner.key]), str(found[captioner.text]).strip()
            counts["unknown"] += key not in keys
            counts["double"] += key in seen
            if key in keys and key not in seen:
                seen.add(key)
                flags = ",".join(faults(text, "stop"))
                yield Row(key, kind, text or None, flags if text else f"{flags},dropped")
