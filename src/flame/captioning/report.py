"""Report on the captions of a data set: counts, speed, flags, words per caption, examples."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from flame.captioning.parts import COUNTS
from flame.study.settings import CaptionsSettings

EXAMPLES = 10  # images
REFUSED = 1000  # images that the report lists


def summarize(
    captions: Path,
    written: pl.LazyFrame,
    about: Sequence[Mapping[str, Any]],
    missing: Mapping[str, Sequence[str]],
    settings: CaptionsSettings,
) -> dict[str, Any]:
    """The report as JSON.

    Args:
        captions: the joined table.
        written: rows of the captioner, with their flags.
        about: descriptions of the parts.
        missing: kind -> keys of the images without a caption.
        settings: of the joined captions.
    """
    table = pl.scan_parquet(captions)
    flags = _flags(written)
    sums = {name: sum(part.get(name, 0) for part in about) for name in COUNTS}
    seconds = sum(part.get("seconds", 0.0) for part in about)
    return {
        "dataset": settings.dataset,
        "captioner": settings.captioner.model_dump(mode="json"),
        "made_with": list({json.dumps(p["made_with"]): p["made_with"] for p in about}.values()),
        "parts": len(about),
        **sums,
        "seconds": seconds,
        "images_per_second": sums["images"] / seconds if seconds else None,
        "missing": {kind: len(keys) for kind, keys in missing.items()},
        "flags": {
            kind: dict(flags.filter(kind=kind).select("flags", "captions").rows())
            for kind in missing
        },
        "refused": {kind: _refused(written, kind) for kind in missing},
        "words": {row.pop("kind"): row for row in _words(table)},
        "examples": _examples(table),
    }


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown page."""
    captioner = report["captioner"]
    who = captioner.get("id") or captioner["model"]
    speed = report["images_per_second"]
    lines = [
        f"# Captions of {report['dataset']} by {who}",
        "",
        f"{report['images']} images in {report['parts']} parts"
        + (f", {speed:.3g} images/s in one job" if speed else "")
        + f"; {report['broken']} images could not be read.",
    ]
    if report["unknown"] or report["double"]:
        lines[-1] += (
            f" {report['unknown']} published captions belong to no image of this data set, "
            f"{report['double']} are second captions of an image; neither are used."
        )
    lines += ["", "| kind | captions | words, mean | 5 % | median | 95 % |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {kind} | {w['captions']} | {w['mean']:.1f} | {w['5%']} | {w['50%']} | {w['95%']} |"
        for kind, w in report["words"].items()
    ]
    lines += ["", "| kind | flag | captions | share of images |", "| --- | --- | ---: | ---: |"]
    for kind, flags in report["flags"].items():
        counts = flags | {"no caption": report["missing"][kind]}
        lines += [
            f"| {kind} | {name} | {count} | {count / max(report['images'], 1):.2%} |"
            for name, count in counts.items()
        ]
    lines += [
        line
        for kind, keys in report["refused"].items()
        if keys
        for line in ("", f"Refused by the engine, {kind}: {', '.join(map(_cell, keys))}.")
    ]
    lines += ["", "| image | kind | flags | caption |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {e['key']} | {e['kind']} | {e['flags']} | {_cell(e['text'])} |"
        for e in report["examples"]
    ]
    return "\n".join([*lines, ""])


def _flags(written: pl.LazyFrame) -> pl.DataFrame:
    """Number of captions by kind and flag."""
    return (
        written.select("kind", pl.col("flags").str.split(","))
        .explode("flags")
        .filter(pl.col("flags") != "")
        .group_by("kind", "flags")
        .agg(captions=pl.len())
        .sort("kind", "flags")
        .collect(engine="streaming")
    )


def _refused(written: pl.LazyFrame, kind: str) -> list[str]:
    """Keys of images that the engine refused to describe, the first `REFUSED` of them."""
    refused = written.filter(pl.col("kind") == kind, pl.col("flags").str.contains("error"))
    return refused.select("key").head(REFUSED).collect(engine="streaming")["key"].to_list()


def _words(table: pl.LazyFrame) -> list[dict[str, Any]]:
    """Number of captions of each kind, and mean and quantiles of their words."""
    words = pl.col("text").str.count_matches(r"\S+")
    quantiles = {f"{q:.0%}": words.quantile(q, "nearest").cast(pl.Int64) for q in (0.05, 0.5, 0.95)}
    by_kind = table.group_by("kind").agg(captions=pl.len(), mean=words.mean(), **quantiles)
    return by_kind.sort("kind").collect().to_dicts()


def _examples(table: pl.LazyFrame) -> list[dict[str, str]]:
    """All captions of a fixed random sample of images."""
    keys = table.select(pl.col("key").unique(maintain_order=True)).collect()["key"].to_list()
    chosen = random.Random(0).sample(keys, min(EXAMPLES, len(keys)))
    return table.filter(pl.col("key").is_in(chosen)).sort("key", "kind").collect().to_dicts()


def _cell(text: str) -> str:
    """A text inside a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
