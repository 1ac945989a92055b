"""Trained tower, images and caption embeddings -> metrics of every benchmark of a bundle."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flame.evaluation import records, tasks
from flame.evaluation.decoding import Decoder
from flame.evaluation.features import Features
from flame.runtime import command
from flame.study.settings import EvaluateSettings, Question
from flame.towers.load import load

log = logging.getLogger(__name__)

PACKAGES = ("numpy", "timm", "torch")  # whose versions are recorded


def evaluate(
    model: Path,
    datasets: list[Path],
    out: Path,
    hits: Path,
    settings: EvaluateSettings,
    stores: tuple[Path, ...] = (),
    threads: int = 1,
    batch_size: int = 256,
    workers: int = 0,
) -> None:
    """Evaluate a tower on the benchmarks of one bundle.

    Args:
        model: folder of the trained tower.
        datasets: folders of the data sets that are evaluated on, and that probes are trained on.
        out: JSON file to write, one record per benchmark.
        hits: Parquet file to write, hit or miss of every query, for paired comparisons of runs.
        settings: the benchmarks.
        stores: embedding stores of the data sets' captions, every part of every kind; none for a
            tower that encodes texts itself.
        threads: CPU threads.
        batch_size: images or texts per forward pass; affects speed and memory only.
        workers: processes that decode images; 0 decodes in this one.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    tower, trained = load(model)
    title = f"evaluate {settings.run}"
    questions = _by_dataset(settings.questions)
    found, frames = [], []
    with Decoder(workers) as decoder:
        features = Features(
            tower,
            datasets,
            stores,
            batch_size,
            title,
            trained.get("texts"),
            questions=questions,
            precision=settings.precision,
            decoder=decoder,
        )
        for question in questions:
            answer = tasks.answer(features.asked(question))
            found.append(records.record(settings.run, question, answer, settings.bootstrap))
            frames.append(records.query_frame(question.benchmark, answer))
            log.info("%s", _summary(found[-1]))
    seconds = time.monotonic() - started
    records.write(out, hits, settings, found, frames, seconds=seconds, packages=PACKAGES)


def _by_dataset(questions: tuple[Question, ...]) -> list[Question]:
    """Questions grouped by data set, because features of the last ones only are kept."""
    names = list(dict.fromkeys(question.dataset for question in questions))
    return sorted(questions, key=lambda question: names.index(question.dataset))


def _summary(record: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {m['value']:.1f} %" for name, m in record["metrics"].items())
    counts = ", ".join(f"{record[what]} {what}" for what in ("images", "texts", "unjoined"))
    return f"{record['name']}: {values} ({counts})"


if __name__ == "__main__":
    command.main(evaluate)
