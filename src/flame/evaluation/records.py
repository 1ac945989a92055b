"""Results of an evaluation: metrics as JSON and, next to it, the hits of every query as Parquet.

`evaluate` and `fewshot` write both files; tables and figures read them. The Parquet file has one
row per query and metric, with the columns

- benchmark, metric: strings.
- query: row of the query in `index.parquet` (images), or among the texts of its kind in
  `captions.parquet`, including those that took no part. For a group of images, number of the group;
  in few-shot classification, number of the episode.
- key: key of the query; in few-shot classification, of the query image.
- hit: bool.
- best: key of the top-ranked candidate, null if nothing is ranked; in few-shot classification, the
  answer of the LLM.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame.evaluation.bootstrap import rate
from flame.runtime.checksums import read_json
from flame.runtime.resumable import write_atomic
from flame.study.schema.benchmarks import FEWSHOT, Bootstrap
from flame.study.settings import EvaluateSettings, FewShotSettings, Question

if TYPE_CHECKING:  # it imports torch, which takes seconds, and tables need none
    from flame.evaluation.tasks import Answer


class Queries(NamedTuple):
    """One metric of one benchmark, query by query."""

    keys: tuple[str, ...]
    values: NDArray[np.floating]
    """(queries,), each in [0, 1]; their mean is the metric."""


def record(run: str, question: Question, answer: "Answer", bootstrap: Bootstrap) -> dict[str, Any]:
    """JSON record of one benchmark; values and 95 % intervals in percent."""
    return {
        "run": run,
        **question.model_dump(mode="json"),
        "images": answer.images,
        "texts": answer.texts,
        "unjoined": answer.unjoined,
        "metrics": _rates(answer, bootstrap),
    }


def fewshot_record(settings: FewShotSettings, answer: "Answer") -> dict[str, Any]:
    """JSON record of few-shot classification, one metric per trial."""
    return {
        "run": settings.run,
        "benchmark": settings.benchmark,
        "name": settings.name,
        "task": FEWSHOT,
        "dataset": settings.dataset,
        "captions": settings.captions,
        "images": answer.images,
        "metrics": _rates(answer, settings.bootstrap),
    }


def query_frame(benchmark: str, answer: "Answer") -> pl.DataFrame:
    """Hits of one benchmark, in the columns that this module lists."""
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


def write(
    metrics: Path,
    hits: Path,
    settings: EvaluateSettings | FewShotSettings,
    records: Sequence[Mapping[str, Any]],
    frames: Sequence[pl.DataFrame],
    *,
    seconds: float,
    packages: Sequence[str],
) -> None:
    """Write both files.

    Args:
        metrics: JSON file.
        hits: Parquet file.
        settings: of the evaluation.
        records: one per benchmark.
        frames: hits of each benchmark.
        seconds: time that the evaluation took.
        packages: installed packages whose versions are recorded.
    """
    result = {
        "settings": settings.model_dump(mode="json"),
        "records": records,
        **made_with(packages, seconds),
    }
    write_atomic(hits, pl.concat(frames).write_parquet)
    write_json(metrics, result)


def made_with(packages: Sequence[str], seconds: float) -> dict[str, Any]:
    """Fields of a result that say how it came about: time taken, versions of packages."""
    versions = {package: version(package) for package in packages}
    return {"seconds": round(seconds, 1), "versions": versions}


def read(metrics: Path, hits: Path) -> dict[tuple[str, str, str], Queries]:
    """(training, benchmark, metric) -> queries, from both files.

    Raises:
        ValueError: a file is broken, or the two do not agree.
    """
    try:
        frame = pl.read_parquet(hits, columns=["benchmark", "metric", "query", "key", "hit"])
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{hits} is broken: {error}; delete it and run again") from error
    parts = frame.sort("query").partition_by("benchmark", "metric", as_dict=True)
    answers = {}
    for found in read_json(metrics)["records"]:
        for name, counted in found["metrics"].items():
            rows = parts.get((found["benchmark"], name))
            counts = (0, 0) if rows is None else (rows["hit"].sum(), len(rows))
            if rows is None or counts != (counted["hits"], counted["queries"]):
                raise ValueError(
                    f"{hits}: {counts[0]} hits of {counts[1]} queries of {found['benchmark']!r} "
                    f"{name!r}; {metrics} says {counted['hits']} of {counted['queries']}"
                )
            queries = Queries(tuple(rows["key"]), rows["hit"].cast(pl.Float64).to_numpy())
            answers[found["run"], found["benchmark"], name] = queries
    return answers


def write_json(path: Path, value: Any) -> None:
    """Write a result as indented JSON that ends in a line feed."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def _rates(answer: "Answer", bootstrap: Bootstrap) -> dict[str, dict[str, float]]:
    """Value, 95 % interval and counts of every metric."""
    return {
        name: rate(int(metric.hit.sum()), len(metric.keys), **bootstrap.model_dump())
        for name, metric in answer.metrics.items()
    }
