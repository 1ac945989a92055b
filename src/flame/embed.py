"""Captions -> facet embeddings of a frozen LLM: one part of a store.

Memory of the host besides that of the program:

- the captions of the part, about 250 bytes and twice its characters each, and 4 bytes for every
  other caption of its kind in the data sets;
- the vectors of two groups of shards: 2 x 512 x K x D x 4 bytes, on a GPU four times as many;
- on a CPU the weights of the LLM. A GPU gets them straight from their files, a few tensors at a
  time; the pages of the files count as used memory, but the system may drop them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import torch

from flame.data.captions import FILE, part_of_kind
from flame.embedding import store
from flame.embedding.llm import FrozenLLM
from flame.embedding.speed import LLMSpeed
from flame.runtime import command, progress
from flame.runtime.checksums import digest, sha256
from flame.runtime.device import compiler_fault, device_of, require_memory
from flame.runtime.errors import known
from flame.runtime.resumable import resumable
from flame.study import gpu_memory
from flame.study.settings import EmbedSettings
from flame.study.shapes import shape_of

log = logging.getLogger(__name__)

WORTH_COMPILING = 20_000  # captions; fewer take about as long to embed as the layers to compile


def embed(
    llm: Path,
    datasets: list[Path],
    out: Path,
    settings: EmbedSettings,
    *,
    token_budget: int | Literal["auto"] = "auto",
    compile: Literal["auto", "yes", "no"] = "auto",
    threads: int | None = None,
) -> None:
    """Embed one part of the captions of a kind.

    Args:
        llm: folder of the frozen LLM.
        datasets: folders of the data sets, named as in the settings.
        out: Zarr store to write; an interrupted job resumes at the first missing shard.
        settings: the prompt, how the LLM reads, and the rows of this part.
        token_budget: tokens per batch, including padding; by default what suits the device. Affects
            speed, and results only by rounding.
        compile: whether the layers of the LLM are compiled, likewise; by default on a GPU, if there
            are many captions and torch.compile works.
        threads: CPU threads; all by default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    speed = LLMSpeed.of(device_of())
    if token_budget != "auto":
        speed = replace(speed, token_budget=token_budget)
    if shape := shape_of(llm):
        needed = gpu_memory.total(gpu_memory.embedding(shape, speed.token_budget))
        require_memory(device_of(), needed, f"embedding by {llm.name}")
    captions = _captions(datasets, settings)
    speed = replace(speed, compile=_compiled(compile, sum(map(len, captions.values()))))
    encoder = FrozenLLM(llm, settings, speed=speed)
    origin = settings.model_dump(mode="json") | {
        "checkpoint": sha256(llm / "flame.json"),
        "inputs": {folder.name: digest(folder / FILE) for folder in datasets},
        "made_with": {name: version(name) for name in ("torch", "transformers", "zarr")}
        | {"dtype": str(encoder.dtype)},
    }
    with resumable(out, origin) as folder:
        _write(folder, origin, captions, encoder, settings)


def _compiled(compile: Literal["auto", "yes", "no"], captions: int) -> bool:
    """Whether to compile: a tenth faster on a GPU, after half a minute (bench/README.md)."""
    device = device_of()
    if compile != "auto" or device.type != "cuda" or captions < WORTH_COMPILING:
        return compile == "yes"
    fault = compiler_fault("inductor", device)
    if fault:
        log.warning("the LLM is not compiled: %s", fault)
    return fault is None


def _captions(datasets: list[Path], settings: EmbedSettings) -> dict[str, pl.DataFrame]:
    """Keys and texts of this part by data set, in the order of the files."""
    folders = {folder.name: folder for folder in datasets}
    captions = {}
    for name in settings.datasets:
        if name not in folders:
            raise ValueError(f"no folder given for data set {known(name, folders)}")
        captions[name] = part_of_kind(
            folders[name] / FILE, settings.kind, settings.part, settings.parts
        )
    return captions


def _write(
    folder: Path,
    origin: dict[str, object],
    captions: dict[str, pl.DataFrame],
    encoder: FrozenLLM,
    settings: EmbedSettings,
) -> None:
    """Embed the shards that the store in `folder` lacks."""
    texts, counts = _prepared(captions, encoder)
    store.create(folder, origin | {"counts": counts})
    writers = {
        name: store.Writer(
            folder,
            name,
            keys=table["key"].to_list(),
            facets=list(settings.facets),
            dim=encoder.dim,
            storage=settings.storage,
        )
        for name, table in captions.items()
    }
    lacking = _lacking(writers, texts, encoder.speed.shards)
    total = sum(map(len, texts.values()))
    done = total - sum(len(group.rows) for group in lacking)
    if done:
        log.info("kept %d of %d captions from an interrupted job", done, total)
    title = f"embed {settings.kind} {settings.part + 1}/{settings.parts}"
    with progress.bar(total, "captions", title, done=done) as bar:
        _embed_groups(lacking, texts, encoder, settings, writers, bar.update)


class _Group(NamedTuple):
    """Rows of a data set that are embedded together, and the shards of them to be written."""

    dataset: str
    rows: range
    shards: list[range]


def _lacking(
    writers: Mapping[str, store.Writer], texts: Mapping[str, Sequence[str]], shards: int
) -> list[_Group]:
    """Groups of consecutive shards of which at least one is not written.

    Captions are batched only within such a group, and a group always starts at the same row: the
    numbers do not depend on where an earlier job was interrupted.
    """
    span, found = shards * store.SHARD_ROWS, []
    for name, writer in writers.items():
        for number, missing in groupby(writer.missing(), lambda rows: rows.start // span):
            rows = range(number * span, min((number + 1) * span, len(texts[name])))
            found.append(_Group(name, rows, [*missing]))
    return found


def _embed_groups(
    groups: Sequence[_Group],
    texts: Mapping[str, Sequence[str]],
    encoder: FrozenLLM,
    settings: EmbedSettings,
    writers: Mapping[str, store.Writer],
    on_batch: Callable[[int], object],
) -> None:
    """Embed groups in order; while one is computed, the next is tokenized and the last written."""
    endings = encoder.endings(settings.prefix[1], [*settings.facets.values()])

    def tokenized(number: int) -> list[list[int]]:
        if number == len(groups):
            return []
        rows = groups[number].rows
        some = texts[groups[number].dataset][rows.start : rows.stop]
        return encoder.prefixes(some, settings.prefix)

    def write(group: _Group, vectors: np.ndarray) -> None:
        for rows in group.shards:
            start = rows.start - group.rows.start
            writers[group.dataset].write(rows, vectors[start : start + len(rows)])

    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        coming, written = ahead.submit(tokenized, 0), None
        for number, group in enumerate(groups):
            prefixes, coming = coming.result(), ahead.submit(tokenized, number + 1)
            vectors = encoder.embed_tokens(prefixes, endings, on_batch=on_batch)
            if written:
                written.result()
            written = behind.submit(write, group, vectors.numpy())
        if written:
            written.result()


def _prepared(
    captions: dict[str, pl.DataFrame], encoder: FrozenLLM
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Texts as the LLM reads them, and their counts, by data set."""
    texts, counts = {}, {}
    for name, table in captions.items():
        whole = table["text"].to_list()
        counts[name] = {"rows": len(whole), "empty": whole.count("")}
        texts[name], cut = encoder.prepare(whole)
        if encoder.options.max_caption_tokens is not None:
            counts[name]["cut"] = cut
        count = ", ".join(f"{value} {what}" for what, value in counts[name].items())
        log.info("%s: %s", name, count)
    return texts, counts


if __name__ == "__main__":
    command.main(embed)
