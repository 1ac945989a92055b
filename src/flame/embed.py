"""Captions -> facet embeddings of a frozen LLM: one part of a store."""

import logging
from importlib.metadata import version
from pathlib import Path

import polars as pl
import torch

from flame.data.captions import FILE, of_kind
from flame.embedding import store
from flame.embedding.llm import TOKEN_BUDGET, FrozenLLM
from flame.runtime import command, progress
from flame.runtime.checksums import sha256
from flame.runtime.errors import known
from flame.runtime.parts import rows_of
from flame.runtime.resumable import resumable
from flame.study.settings import EmbedSettings

log = logging.getLogger(__name__)


def embed(
    llm: Path,
    datasets: list[Path],
    out: Path,
    settings: EmbedSettings,
    *,
    token_budget: int = TOKEN_BUDGET,
    threads: int | None = None,
) -> None:
    """Embed one part of the captions of a kind.

    Args:
        llm: folder of the frozen LLM.
        datasets: folders of the data sets, named as in the settings.
        out: Zarr store to write; an interrupted job resumes at the first missing shard.
        settings: the prompt, how the LLM reads, and the rows of this part.
        token_budget: tokens per batch; affects speed, and results only by rounding.
        threads: CPU threads; all by default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    captions = _captions(datasets, settings)
    encoder = FrozenLLM(llm, settings)
    origin = settings.model_dump(mode="json") | {
        "checkpoint": sha256(llm / "flame.json"),
        "inputs": {folder.name: sha256(folder / FILE) for folder in datasets},
        "made_with": {name: version(name) for name in ("torch", "transformers", "zarr")}
        | {"dtype": str(encoder.dtype)},
    }
    with resumable(out, origin) as folder:
        _write(folder, origin, captions, encoder, settings, token_budget)


def _captions(datasets: list[Path], settings: EmbedSettings) -> dict[str, pl.DataFrame]:
    """Keys and texts of this part by data set, in the order of the files."""
    folders = {folder.name: folder for folder in datasets}
    captions = {}
    for name in settings.datasets:
        if name not in folders:
            raise ValueError(f"no folder given for data set {known(name, folders)}")
        rows = of_kind(folders[name] / FILE, settings.kind)
        own = rows_of(len(rows), settings.part, settings.parts)
        captions[name] = rows[own.start : own.stop]
    return captions


def _write(
    folder: Path,
    origin: dict[str, object],
    captions: dict[str, pl.DataFrame],
    encoder: FrozenLLM,
    settings: EmbedSettings,
    token_budget: int,
) -> None:
    """Embed the shards that the store in `folder` lacks.

    The captions of a shard are batched only among themselves, so its numbers do not depend on where
    an earlier job was interrupted.
    """
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
    missing = [(name, rows) for name, writer in writers.items() for rows in writer.missing()]
    total = sum(map(len, texts.values()))
    done = total - sum(len(rows) for _, rows in missing)
    if done:
        log.info("kept %d of %d captions from an interrupted job", done, total)
    title = f"embed {settings.kind} {settings.part + 1}/{settings.parts}"
    with progress.bar(total, "captions", title, done=done) as bar:
        for name, rows in missing:
            vectors = encoder.embed(
                texts[name][rows.start : rows.stop],
                settings.prefix,
                list(settings.facets.values()),
                token_budget=token_budget,
                on_batch=bar.update,
            )
            writers[name].write(rows, vectors.numpy())


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
