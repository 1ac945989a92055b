"""Result files as the evaluate stage writes them, from given hits and misses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

Answers = Mapping[str, Mapping[str, Sequence[int]]]
"""Benchmark -> metric -> hit (1) or miss (0) of every query."""


def counted(hits: int, queries: int) -> list[int]:
    """The given number of hits, followed by misses."""
    return [1] * hits + [0] * (queries - hits)


def write(folder: Path, run: str, answers: Answers) -> tuple[Path, Path]:
    """JSON and Parquet of one training; query n of a metric has the key `<number of queries>-n`."""
    records = [
        {
            "run": run,
            "benchmark": benchmark,
            "metrics": {m: {"hits": sum(hit), "queries": len(hit)} for m, hit in metrics.items()},
        }
        for benchmark, metrics in answers.items()
    ]
    frames = [
        pl.DataFrame(
            {
                "benchmark": benchmark,
                "metric": metric,
                "query": range(len(hit)),
                "key": [f"{len(hit)}-{n}" for n in range(len(hit))],
                "hit": [bool(h) for h in hit],
            }
        )
        for benchmark, metrics in answers.items()
        for metric, hit in metrics.items()
    ]
    files = folder / f"{run}.json", folder / f"{run}.parquet"
    files[0].write_text(json.dumps({"records": records}))
    pl.concat(frames).write_parquet(files[1])
    return files
