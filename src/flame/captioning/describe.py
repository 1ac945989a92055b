"""Images -> captions by a multimodal LLM: ask, check, retry once, fall back to the raw caption."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
from PIL import Image

from flame.captioning import engines
from flame.captioning.engines import Engine, Reply, Request
from flame.captioning.faults import faults
from flame.captioning.parts import Row, chunk_path, write_chunk
from flame.data import captions
from flame.data.images import ImageReader
from flame.data.pixels import ImageError
from flame.runtime import progress
from flame.runtime.parts import rows_of
from flame.study.schema.data import Sampling, ServerCaptioner, TransformersCaptioner, VllmCaptioner
from flame.study.settings import CaptionSettings

log = logging.getLogger(__name__)

Captioner = VllmCaptioner | ServerCaptioner | TransformersCaptioner

DEAD = 16  # failed requests from which the engine is to blame, not the images


def describe_part(
    captioner: Captioner, images: Path, folder: Path, settings: CaptionSettings, chunk: int
) -> None:
    """Caption the images of one part, chunk by chunk; chunks that exist are kept.

    Args:
        captioner: multimodal LLM and its prompts.
        images: folder of the data set.
        folder: where chunks are written.
        settings: which part of the images.
        chunk: images per chunk.
    """
    reader = ImageReader(images)
    own = rows_of(len(reader), settings.part, settings.parts)
    chunks = {
        chunk_path(folder, number): own[first : first + chunk]
        for number, first in enumerate(range(0, len(own), chunk))
    }
    missing = {path: rows for path, rows in chunks.items() if not path.exists()}
    done = len(own) - sum(map(len, missing.values()))
    if done:
        log.info("resuming: %d of %d images are done", done, len(own))
    if not missing:
        return
    raw = raw_captions(images, reader.keys[own.start : own.stop].to_list())
    engine = engines.create(captioner)
    title = f"caption {settings.dataset} {settings.part + 1}/{settings.parts}"
    with progress.bar(len(own), "images", title, done=done) as bar:
        for path, rows in missing.items():
            began = time.monotonic()
            readable = _read(reader, rows)
            found = describe(engine, readable, captioner, raw)
            found += [
                Row(reader.keys[i], kind, None, "broken")
                for i in rows
                if reader.keys[i] not in readable
                for kind in captioner.prompts
            ]
            seconds = time.monotonic() - began
            broken = len(rows) - len(readable)
            write_chunk(path, found, images=len(rows), broken=broken, seconds=seconds)
            bar.update(len(rows))


def raw_captions(images: Path, keys: list[str]) -> dict[str, str]:
    """Key -> first raw caption, for every key that has one."""
    table = captions.scan(images / captions.FILE).filter(pl.col("key").is_in(keys))
    return dict(captions.first_of_kind(table, "raw").collect().rows())


def describe(
    engine: Engine,
    images: Mapping[str, Image.Image],
    captioner: Captioner,
    raw: Mapping[str, str],
) -> list[Row]:
    """Captions of every kind for some images, with at most one retry each.

    Args:
        engine: engine of the captioner.
        images: key -> upright RGB image.
        captioner: prompts and sampling.
        raw: key -> raw caption, the fallback for a caption that stays bad.

    Returns:
        One row per image and kind; the kinds of an image are adjacent.

    Raises:
        ValueError: every request failed.
    """
    wanted = [(key, kind) for key in images for kind in captioner.prompts]
    first = _ask(engine, images, wanted, captioner, captioner.sampling, "first")
    errors = [reply.text for reply in first.values() if reply.finish == "error"]
    if errors:
        log.warning("%d of %d requests failed, for example: %s", len(errors), len(first), errors[0])
    if len(errors) == len(first) >= DEAD:
        raise ValueError(f"all {len(first)} requests failed; the last one: {errors[-1]}")
    wrong = {pair: faults(reply.text, reply.finish) for pair, reply in first.items()}
    # Other sampling does not cure an error, and the engine has already retried it.
    again = [pair for pair in wanted if wrong[pair] and "error" not in wrong[pair]]
    second = _ask(engine, images, again, captioner, captioner.retry, "second")
    rows = []
    for pair in wanted:
        reply, left, flags = first[pair], wrong[pair], [*wrong[pair]]
        if pair in second:
            reply = second[pair]
            left = faults(reply.text, reply.finish)
            flags += [*left, "retried"]
        text: str | None = reply.text.strip()
        if left:
            text, how = fallback(raw.get(pair[0]))
            flags.append(how)
        rows.append(Row(*pair, text, ",".join(dict.fromkeys(flags))))
    return rows


def fallback(raw: str | None) -> tuple[str | None, str]:
    """Replacement of a bad caption, and the flag for it."""
    return (raw, "fallback") if raw else (None, "dropped")


def _read(reader: ImageReader, rows: range) -> dict[str, Image.Image]:
    """Images by key; unreadable ones are logged and left out."""
    found = {}
    for i in rows:
        try:
            found[reader.keys[i]] = Image.fromarray(reader.read(i))
        except ImageError as error:
            log.warning("skipped: %s", error)
    return found


def _ask(
    engine: Engine,
    images: Mapping[str, Image.Image],
    pairs: Sequence[tuple[str, str]],
    captioner: Captioner,
    sampling: Sampling,
    attempt: str,
) -> dict[tuple[str, str], Reply]:
    """Replies by (key, kind); a seed depends only on these two, the captioner and the attempt."""
    requests = []
    for key, kind in pairs:
        purpose = repr((captioner.seed, attempt, key, kind)).encode()
        seed = int.from_bytes(hashlib.sha256(purpose).digest()[:4], "big") >> 1
        prompt, limit = captioner.prompts[kind], captioner.max_tokens[kind]
        requests.append(Request(images[key], prompt, sampling, limit, seed))
    replies = engine.describe(requests) if requests else []
    return dict(zip(pairs, replies, strict=True))
