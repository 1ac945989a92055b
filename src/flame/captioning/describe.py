"""Images -> captions by a multimodal LLM: ask, check, retry once, fall back to the raw caption.

Images flow: a new one is decoded and asked about as soon as another is finished, across chunks, so
the engine never waits for the slowest caption of a chunk. A chunk is written once all its images
are finished, in whatever order chunks are; a killed job resumes with the chunks that are missing.

A resumed part has the same captions as an undisturbed one where the engine is deterministic: by
transformers on the same hardware, by any engine with greedy decoding up to the rounding of its
batches, and by none that samples from its own generator (`seed_requests: false`).
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import polars as pl
from PIL import Image
from tqdm import tqdm

from flame.captioning import engines
from flame.captioning.engines import Engine, Reply, Request
from flame.captioning.faults import faults
from flame.captioning.parts import Row, chunk_path, write_chunk
from flame.data import captions
from flame.data.images import ImageReader
from flame.data.shards import ImageError
from flame.runtime import progress
from flame.runtime.parts import rows_of
from flame.study.schema.data import Sampling, ServerCaptioner, TransformersCaptioner, VllmCaptioner
from flame.study.settings import CaptionSettings

log = logging.getLogger(__name__)

Captioner = VllmCaptioner | ServerCaptioner | TransformersCaptioner

DEAD = 16  # failed requests from which the engine is to blame, not the images
NAMED = 3  # refused images that a log line names


class Described(NamedTuple):
    """Captions of some images.

    Attributes:
        rows: one per image and kind; the kinds of an image are adjacent.
        refused: (key, kind) -> error message of the engine, for requests that it refused.
    """

    rows: list[Row]
    refused: dict[tuple[str, str], str]


@dataclass
class _Chunk:
    """A chunk whose images are on their way.

    Attributes:
        path: file to write.
        images: row numbers of its images.
        found: first row number of each finished group of images -> their captions.
        done: images that are finished.
        broken: images that cannot be read.
        refused: as in `Described`.
    """

    path: Path
    images: range
    found: dict[int, list[Row]] = field(default_factory=dict)
    done: int = 0
    broken: int = 0
    refused: dict[tuple[str, str], str] = field(default_factory=dict)


def describe_part(
    captioner: Captioner,
    images: Path,
    folder: Path,
    settings: CaptionSettings,
    chunk: int,
    workers: int = 1,
) -> None:
    """Caption the images of one part; chunks that exist are kept.

    Args:
        captioner: multimodal LLM and its prompts.
        images: folder of the data set.
        folder: where chunks are written.
        settings: which part of the images.
        chunk: images per chunk.
        workers: threads that decode images.
    """
    reader = ImageReader(images)
    own = rows_of(len(reader), settings.part, settings.parts)
    chunks = [
        _Chunk(chunk_path(folder, number), own[first : first + chunk])
        for number, first in enumerate(range(0, len(own), chunk))
    ]
    missing = [chunk for chunk in chunks if not chunk.path.exists()]
    done = len(own) - sum(len(chunk.images) for chunk in missing)
    if done:
        log.info("resuming: %d of %d images are done", done, len(own))
    if not missing:
        return
    raw = raw_captions(images, reader.keys[own.start : own.stop].to_list())
    engine = engines.create(captioner, _seed(captioner.seed, settings.dataset, settings.part))
    title = f"caption {settings.dataset} {settings.part + 1}/{settings.parts}"
    with progress.bar(len(own), "images", title, done=done) as bar:
        flow = _Flow(captioner, reader, engine, raw, workers, bar)
        asyncio.run(flow.run(missing))
    seconds, count = bar.format_dict["elapsed"], len(own) - done
    log.info("%s: %d images in %.0f s: %.3g images/s", title, count, seconds, count / seconds)


class _Flow:
    """Images on their way from the data set through the engine into chunks.

    Memory holds the images of `engine.calls` calls, and of one decoded ahead by each worker.
    """

    def __init__(
        self,
        captioner: Captioner,
        reader: ImageReader,
        engine: Engine,
        raw: Mapping[str, str],
        workers: int,
        bar: tqdm,
    ) -> None:
        self._captioner, self._reader, self._engine = captioner, reader, engine
        self._raw, self._bar = raw, bar
        # Threads, because Pillow decodes without the interpreter lock.
        self._decoding = ThreadPoolExecutor(workers, "decode")
        self._limit = engine.calls + workers
        self._written = time.monotonic()

    async def run(self, chunks: Sequence[_Chunk]) -> None:
        """Caption the images of chunks, and write each once it is complete."""
        running: set[asyncio.Task[None]] = set()
        try:
            for chunk, rows in self._groups(chunks):
                if len(running) == self._limit:
                    running = await _some_done(running)
                running.add(asyncio.create_task(self._caption(chunk, rows)))
            while running:
                running = await _some_done(running)
        finally:
            self._decoding.shutdown(wait=False, cancel_futures=True)
            self._engine.close()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _groups(self, chunks: Sequence[_Chunk]) -> Iterator[tuple[_Chunk, range]]:
        """Images of one call each. None crosses chunks, so a resumed job makes the same calls."""
        size = self._engine.batch
        for chunk in chunks:
            for first in range(0, len(chunk.images), size):
                yield chunk, chunk.images[first : first + size]

    async def _caption(self, chunk: _Chunk, rows: range) -> None:
        loop = asyncio.get_running_loop()
        readable = await loop.run_in_executor(self._decoding, _read, self._reader, rows)
        described = await describe(self._engine, readable, self._captioner, self._raw)
        keys = [self._reader.keys[i] for i in rows]
        broken = {key for key in keys if key not in readable}
        found = {(row.key, row.kind): row for row in described.rows}
        chunk.found[rows.start] = [
            found.get((key, kind)) or Row(key, kind, None, "broken")
            for key in keys
            for kind in self._captioner.prompts
        ]
        chunk.refused |= described.refused
        chunk.done += len(rows)
        chunk.broken += len(broken)
        if chunk.done == len(chunk.images):
            self._write(chunk)
        self._bar.update(len(rows))

    def _write(self, chunk: _Chunk) -> None:
        asked = (chunk.done - chunk.broken) * len(self._captioner.prompts)
        _check_refused(chunk.refused, asked)
        rows = [row for first in sorted(chunk.found) for row in chunk.found[first]]
        now = time.monotonic()
        # The time since the last one: chunks overlap, and the sum is the time of the job.
        seconds, self._written = now - self._written, now
        write_chunk(chunk.path, rows, images=chunk.done, broken=chunk.broken, seconds=seconds)
        chunk.found.clear()


async def _some_done(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait until a task has ended, and return the others; its error is raised."""
    done, others = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return others


def _check_refused(refused: Mapping[tuple[str, str], str], asked: int) -> None:
    """Name requests that the engine refused; if it refused all, the engine is to blame.

    Raises:
        ValueError: every request failed.
    """
    if not refused:
        return
    last = [*refused.values()][-1]
    if len(refused) == asked >= DEAD:
        raise ValueError(f"all {asked} requests failed; the last one: {last}")
    named = [f"{kind} of {key!r} ({why})" for (key, kind), why in [*refused.items()][:NAMED]]
    more = ", ..." if len(refused) > NAMED else ""
    log.warning("%d of %d requests failed: %s%s", len(refused), asked, ", ".join(named), more)


def raw_captions(images: Path, keys: list[str]) -> dict[str, str]:
    """Key -> first raw caption, for every key that has one."""
    table = captions.scan(images / captions.FILE).filter(pl.col("key").is_in(keys))
    return dict(captions.first_of_kind(table, "raw").collect().rows())


async def describe(
    engine: Engine,
    images: Mapping[str, Image.Image],
    captioner: Captioner,
    raw: Mapping[str, str],
) -> Described:
    """Captions of every kind for some images, with at most one retry each.

    Args:
        engine: engine of the captioner.
        images: key -> upright RGB image.
        captioner: prompts and sampling.
        raw: key -> raw caption, the fallback for a caption that stays bad.
    """
    wanted = [(key, kind) for key in images for kind in captioner.prompts]
    first = await _ask(engine, images, wanted, captioner, captioner.sampling, "first")
    wrong = {pair: faults(reply.text, reply.finish) for pair, reply in first.items()}
    # Other sampling does not cure an error, and the engine has already retried it.
    again = [pair for pair in wanted if wrong[pair] and "error" not in wrong[pair]]
    second = await _ask(engine, images, again, captioner, captioner.retry, "second")
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
    errors = {pair: reply.text for pair, reply in first.items() if reply.finish == "error"}
    return Described(rows, errors)


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


async def _ask(
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
        seed = _seed(captioner.seed, attempt, key, kind) if captioner.seed_requests else None
        prompt, limit = captioner.prompts[kind], captioner.max_tokens[kind]
        requests.append(Request(images[key], prompt, sampling, limit, seed))
    replies = await engine.describe(requests) if requests else []
    return dict(zip(pairs, replies, strict=True))


def _seed(*purpose: object) -> int:
    """A seed in [0, 2**31) for a purpose."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:4], "big") >> 1
