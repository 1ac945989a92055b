"""Trained tower, images and caption embeddings -> answers to every benchmark of a bundle."""

import json
import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch

from flame.evaluation import tasks
from flame.evaluation.bootstrap import rate
from flame.evaluation.features import Features
from flame.evaluation.tasks import Answer, Asked
from flame.runtime import command
from flame.runtime.resumable import write_atomic
from flame.study.schema.benchmarks import Bootstrap
from flame.study.settings import EvaluateSettings, Question
from flame.towers.load import load

log = logging.getLogger(__name__)


def evaluate(
    model: Path,
    datasets: list[Path],
    out: Path,
    hits: Path,
    settings: EvaluateSettings,
    stores: tuple[Path, ...] = (),
    threads: int = 1,
    batch_size: int = 256,
) -> None:
    """Ask a tower the questions of one bundle.

    Args:
        model: folder of the trained tower.
        datasets: folders of the data sets that the questions are asked on, and probes trained on.
        out: JSON to write, one record per benchmark.
        hits: Parquet to write, hit or miss of every query, for paired comparisons of runs.
        settings: the questions.
        stores: embedding stores of the data sets' captions: every part of every kind; none for a
            tower that encodes texts itself.
        threads: CPU threads.
        batch_size: images, or texts, per forward pass; changes speed and memory.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    tower, trained = load(model)
    title = f"evaluate {settings.run}"
    features = Features(tower, datasets, stores, batch_size, title, trained.get("texts"))
    records, frames = [], []
    for question in _by_dataset(settings.questions):
        answer = ask(features.asked(question))
        records.append(record(settings.run, question, answer, settings.bootstrap))
        frames.append(query_frame(question.benchmark, answer))
        log.info("%s", _summary(records[-1]))
    result = {
        "settings": settings.model_dump(mode="json"),
        "records": records,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {package: version(package) for package in ("numpy", "timm", "torch")},
    }
    write_atomic(hits, pl.concat(frames).write_parquet)
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


def ask(asked: Asked) -> Answer:
    """Answer to one question; an error names the benchmark."""
    try:
        return tasks.module(asked.question.task).evaluate(asked)
    except ValueError as error:
        raise ValueError(f"benchmark {asked.question.benchmark!r}: {error}") from error


def record(run: str, question: Question, answer: Answer, bootstrap: Bootstrap) -> dict[str, Any]:
    """What the JSON says of one benchmark; values and 95 % intervals in percent."""
    metrics = {
        name: rate(int(hit.sum()), len(keys), **bootstrap.model_dump())
        for name, (keys, hit, *_) in answer.metrics.items()
    }
    return {
        "run": run,
        **question.model_dump(mode="json"),
        "images": answer.images,
        "texts": answer.texts,
        "unjoined": answer.unjoined,
        "metrics": metrics,
    }


def query_frame(benchmark: str, answer: Answer) -> pl.DataFrame:
    """One row per query and metric: benchmark, metric, query, key, hit, best.

    Column `query` is the row of the query among the data set's images (in `index.parquet`), or its
    texts of the question's kind (in `captions.parquet`), whether or not others took part; for a
    group of images it is the number of the group. `best` is the key of what was ranked first, null
    where nothing was.
    """
    frames = []
    for name, metric in answer.metrics.items():
        count = len(metric.keys)
        frames.append(
            pl.DataFrame(
                {
                    "benchmark": [benchmark] * count,
                    "metric": [name] * count,
                    "query": pl.Series(metric.rows or range(count), dtype=pl.Int64),
                    "key": metric.keys,
                    "hit": metric.hit.numpy(),
                    "best": pl.Series(metric.best or [None] * count, dtype=pl.String),
                }
            )
        )
    return pl.concat(frames)


def _by_dataset(questions: tuple[Question, ...]) -> list[Question]:
    """Questions about one data set together, because only its features are kept."""
    names = list(dict.fromkeys(question.dataset for question in questions))
    return sorted(questions, key=lambda question: names.index(question.dataset))


def _summary(record: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {m['value']:.1f} %" for name, m in record["metrics"].items())
    counts = ", ".join(f"{record[what]} {what}" for what in ("images", "texts", "unjoined"))
    return f"{record['benchmark']}: {values} ({counts})"


if __name__ == "__main__":
    command.main(evaluate)
