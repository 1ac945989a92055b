"""Tower, images and frozen LLM -> few-shot classification by words (Section C.3, Table C5)."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flame.data.images import ImageReader
from flame.evaluation import records
from flame.evaluation.decoding import Decoder
from flame.evaluation.fewshot import classify, draw, pictures, used_images, word_grids
from flame.evaluation.vocabulary import Mapper, Speaker
from flame.runtime import command, progress
from flame.runtime.device import device_of, require_memory
from flame.study import gpu_memory
from flame.study.settings import FewShotSettings
from flame.study.shapes import shape_of

log = logging.getLogger(__name__)

PACKAGES = ("timm", "torch", "transformers")  # whose versions are recorded


def fewshot(
    model: Path,
    llm: Path,
    dataset: Path,
    stores: list[Path],
    out: Path,
    hits: Path,
    words: Path,
    settings: FewShotSettings,
    threads: int = 1,
    batch_size: int = 64,
    workers: int = 0,
) -> None:
    """Let the frozen LLM classify images from the words that the tower maps them to.

    Args:
        model: folder of the trained tower.
        llm: folder of the LLM on whose embeddings it was trained.
        dataset: folder of the labelled images.
        stores: stores of the training captions, every part of the kind in the settings.
        out: JSON file to write, one record with a metric for every trial.
        hits: Parquet file to write, hit or miss of every episode under the key of its query.
        words: JSON file to write, the words of some images by position (Figure C1).
        settings: the trials.
        threads: CPU threads.
        batch_size: images per forward pass; affects speed and memory only.
        workers: processes that decode images; 0 decodes in this one.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    if shape := shape_of(llm):
        needed = gpu_memory.total(gpu_memory.vocabulary(shape))
        require_memory(device_of(), needed, f"few-shot classification by {llm.name}")
    reader, chosen = ImageReader(dataset), settings.fewshot
    episodes = {
        trial: draw(reader.labels, trial, chosen.episodes, settings.seed) for trial in chosen.trials
    }
    speaker = Speaker(llm)
    shown, used = pictures(reader.labels, chosen.pictures), used_images(episodes)
    with Decoder(workers) as decoder:
        mapper = Mapper.open(model, llm, speaker, stores, settings, batch_size, decoder)
        texts = dict(zip(used, mapper.texts(reader, used, chosen.pool), strict=True))
        grids = mapper.words(reader, shown, chosen.picture_pool)
    total = sum(map(len, episodes.values()))
    with progress.bar(total, "answers", f"fewshot {settings.run}") as bar:
        answer = classify(speaker, reader, texts, episodes, bar.update)
    record = records.fewshot_record(settings, answer)
    _log(record)
    records.write_json(words, word_grids(speaker, reader, shown, grids))
    frames, seconds = [records.query_frame(settings.benchmark, answer)], time.monotonic() - started
    records.write(out, hits, settings, [record], frames, seconds=seconds, packages=PACKAGES)


def _log(record: Mapping[str, Any]) -> None:
    for name, metric in record["metrics"].items():
        log.info("%s: %s %.1f %%", record["name"], name, metric["value"])


if __name__ == "__main__":
    command.main(fewshot)
