"""Embeddings of captions -> what each prompt knows of the images, by linear probes."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flame.data import attributes
from flame.embedding.store import Embeddings
from flame.evaluation import records
from flame.evaluation.attributes import Outcome, cross_validated, folds
from flame.evaluation.bootstrap import rate
from flame.runtime import command, progress
from flame.runtime.resumable import write_atomic
from flame.study.settings import KnowledgeSettings

log = logging.getLogger(__name__)

PACKAGES = ("numpy",)  # whose versions are recorded


def knowledge(
    dataset: Path, stores: list[Path], out: Path, hits: Path, settings: KnowledgeSettings
) -> None:
    """Probe the vectors of every facet for every attribute of the images.

    Args:
        dataset: folder of the images, with their attributes.
        stores: embeddings of their captions, every part of the kind in the settings.
        out: JSON file to write, one record for every facet and attribute, and for the most
            frequent class of each attribute.
        hits: Parquet file to write, hit or miss of every caption, in the same order.
        settings: LLM, facets, attributes and the probe.
    """
    started = time.monotonic()
    embeddings = Embeddings.open(stores, settings.dataset)
    keys = embeddings.keys.to_list()
    shown = attributes.read(dataset, settings.attributes)
    # A left join keeps the order of the captions.
    joined = pl.DataFrame({"key": keys}).join(shown, on="key", how="left", maintain_order="left")
    classes = {name: joined[name].to_list() for name in settings.attributes}
    fold = folds(keys, settings.folds, settings.seed)
    found, frames = [], []
    with progress.bar(len(settings.facets), "prompts", f"knowledge {settings.llm}") as bar:
        for facet in settings.facets:
            vectors = embeddings.rows(np.arange(len(keys)), [facet])[:, 0].astype(np.float64)
            answers = cross_validated(vectors, classes, fold, settings.penalties)
            for name, outcome in answers.items():
                found.append(_record(facet, name, outcome, settings))
                frames.append(_frame(facet, name, outcome, keys))
            bar.update()
    result = {
        "settings": settings.model_dump(mode="json"),
        "captions": len(keys),
        "records": found,
        "majority": [_majority(n, outcome, classes, settings) for n, outcome in answers.items()],
    }
    write_atomic(hits, pl.concat(frames).write_parquet)
    records.write_json(out, result | records.made_with(PACKAGES, time.monotonic() - started))


def _record(
    facet: str, attribute: str, outcome: Outcome, settings: KnowledgeSettings
) -> dict[str, Any]:
    bootstrap = settings.bootstrap.model_dump()
    accuracy = rate(int(outcome.hit.sum()), len(outcome.hit), **bootstrap)
    log.info("%s: %s by %s %.1f %%", settings.llm, attribute, facet, accuracy["value"])
    return {"facet": facet, "attribute": attribute, **accuracy, "penalties": outcome.penalties}


def _majority(
    attribute: str,
    outcome: Outcome,
    classes: Mapping[str, list[str | None]],
    settings: KnowledgeSettings,
) -> dict[str, Any]:
    """The same for the most frequent class of the training captions, which needs no vector."""
    bootstrap = settings.bootstrap.model_dump()
    accuracy = rate(int(outcome.majority.sum()), len(outcome.majority), **bootstrap)
    number = len({name for name in classes[attribute] if name is not None})
    return {"attribute": attribute, "classes": number, **accuracy}


def _frame(facet: str, attribute: str, outcome: Outcome, keys: list[str]) -> pl.DataFrame:
    columns = {
        "query": outcome.rows,
        "key": [keys[row] for row in outcome.rows],
        "hit": outcome.hit,
    }
    names = (pl.lit(facet).alias("facet"), pl.lit(attribute).alias("attribute"))
    return pl.DataFrame(columns).select(*names, pl.all())


if __name__ == "__main__":
    command.main(knowledge)
