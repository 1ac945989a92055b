"""Visual tower, images and caption embeddings -> answers to every benchmark of a bundle."""

import json
import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import torch
from torch import Tensor

from flame import command, progress, tasks
from flame.bootstrap import interval
from flame.config import Bootstrap, EvaluateSettings, Question, TrainSettings, known
from flame.features import image_features, text_features
from flame.images import ImageReader
from flame.model import load
from flame.partial import write_atomic
from flame.store import Embeddings, by_kind
from flame.tasks import Answer

T = TypeVar("T")

log = logging.getLogger(__name__)


def evaluate(
    model: Path,
    datasets: list[Path],
    stores: list[Path],
    out: Path,
    hits: Path,
    settings: EvaluateSettings,
    threads: int = 1,
    batch_size: int = 256,
) -> None:
    """Ask a tower the questions of one bundle.

    Args:
        model: folder of the trained tower.
        datasets: folders of the data sets that the questions are asked on.
        stores: embedding stores of their captions: every part of every kind.
        out: JSON to write, one record per benchmark.
        hits: Parquet to write, hit or miss of every query, for paired comparisons of runs.
        settings: the questions.
        threads: CPU threads.
        batch_size: images per forward pass; changes speed and memory.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    tower, run = load(model)
    image_size = TrainSettings.model_validate(run["settings"]).backbone.image_size
    paths = {path.name: path for path in datasets}
    parts = by_kind(stores)
    names = dict.fromkeys(question.dataset for question in settings.questions)
    readers = {name: ImageReader(_get(paths, name, "data set")) for name in names}
    records, frames = [], []
    total = sum(len(reader.keys) for reader in readers.values())
    with progress.bar(total, "images", f"evaluate {settings.run}") as bar:
        for name, reader in readers.items():
            images = image_features(tower, reader, image_size, batch_size, bar.update)
            for question in (q for q in settings.questions if q.dataset == name):
                kind_parts = _get(parts, question.captions, "embeddings of captions of kind")
                texts = Embeddings.open(kind_parts, name)
                answer = ask(question, images, reader, texts, tower.centers)
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


def ask(
    question: Question,
    images: Tensor,
    reader: ImageReader,
    texts: Embeddings,
    centers: Mapping[str, Mapping[str, Tensor]],
) -> Answer:
    """Answer of a tower to one question.

    Args:
        question: task, and facets of the captions.
        images: (I, d), from `image_features`.
        reader: keys and labels of the images.
        texts: embeddings of the captions.
        centers: kind -> facet -> (d,), of the tower; empty where its recipe does not center.
    """
    if texts.dim != images.shape[1]:
        raise ValueError(
            f"the tower was trained on text embeddings of width {images.shape[1]}, "
            f"those of {question.dataset!r} by {texts.attributes['llm']!r} have {texts.dim}"
        )
    task = tasks.module(question.task)
    try:
        center = _get(centers, question.center, "center of kind") if centers else {}
        features = text_features(texts, question.facets, center)
        return task.evaluate(images, reader.keys, reader.labels, features, texts.keys)
    except ValueError as error:
        raise ValueError(f"benchmark {question.benchmark!r}: {error}") from error


def record(run: str, question: Question, answer: Answer, bootstrap: Bootstrap) -> dict[str, Any]:
    """What the JSON says of one benchmark; values and 95 % intervals in percent."""
    metrics = {}
    for name, (keys, hit) in answer.metrics.items():
        num_hits, queries = int(hit.sum()), len(keys)
        low, high = interval([num_hits], [queries], **bootstrap.model_dump())
        metrics[name] = {
            "value": 100 * num_hits / queries,
            "low": 100 * low,
            "high": 100 * high,
            "hits": num_hits,
            "queries": queries,
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
    """One row per query and metric: benchmark, metric, query, key, hit."""
    return pl.concat(
        pl.DataFrame({"query": range(len(keys)), "key": keys, "hit": hit.numpy()}).select(
            pl.lit(benchmark).alias("benchmark"), pl.lit(name).alias("metric"), pl.all()
        )
        for name, (keys, hit) in answer.metrics.items()
    )


def _get(table: Mapping[str, T], key: str, what: str) -> T:
    if key not in table:
        raise ValueError(f"no {what} {known(key, table)}")
    return table[key]


def _summary(record: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {m['value']:.1f} %" for name, m in record["metrics"].items())
    counts = ", ".join(f"{record[what]} {what}" for what in ("images", "texts", "unjoined"))
    return f"{record['benchmark']}: {values} ({counts})"


if __name__ == "__main__":
    command.main(evaluate)
