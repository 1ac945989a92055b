"""Images -> long and short captions by a multimodal LLM, in parts; parts -> one table, a report."""

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from huggingface_hub import hf_hub_download
from PIL import Image

from flame.captioning import engines
from flame.captioning.describe import Captioner, Row, describe, faults, read_objects
from flame.data.images import ImageReader
from flame.data.shards import CAPTIONS, ImageError
from flame.runtime import command, progress
from flame.runtime.checksums import seal, sha256, verified
from flame.runtime.parts import rows_of
from flame.runtime.resumable import resumable, write_atomic
from flame.study.schema.data import PublishedCaptions
from flame.study.settings import CaptionSettings, CaptionsSettings

log = logging.getLogger(__name__)

CHUNK = 256  # images: enough to keep an engine busy, and what an interruption loses
PUBLISHED_CHUNK = 65_536  # captions
EXAMPLES = 10  # images in the report
PART = "part.parquet"
ABOUT = "flame"  # key of a part's description, in the metadata of its file
COUNTS = ("images", "broken", "unknown", "double")
# What tells the parts of one set from each other; in all else they must agree.
OWN = ("part", "made_with", "chunk", "seconds", *COUNTS)


def write(
    images: Path,
    out: Path,
    settings: CaptionSettings,
    *,
    threads: int | None = None,
    chunk: int = CHUNK,
) -> None:
    """Caption one part of a data set's images.

    Args:
        images: folder of the data set.
        out: Parquet file to write, (key, kind, text, flags) a caption; an interrupted job goes on
            where it was.
        settings: who captions, how, and which part of the images.
        threads: CPU threads; all by default.
        chunk: images that are described, and written, together.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    engine = settings.captioner.engine
    origin = settings.model_dump(mode="json") | {
        "inputs": {name: sha256(images / f"{name}.parquet") for name in ("index", "captions")},
        "made_with": {} if engine == "published" else engines.versions(engine),
        "chunk": chunk,
    }
    with resumable(out, origin, file=PART) as folder:
        counts: dict[str, float]
        if isinstance(settings.captioner, PublishedCaptions):
            counts = _take_over(settings.captioner, images, folder)
        else:
            _describe_part(settings.captioner, images, folder, settings, chunk)
            counts = _counts(folder)
        about = {ABOUT: json.dumps(origin | counts)}
        chunks = pl.scan_parquet(sorted(folder.glob("chunk-*.parquet")), schema=CAPTIONS)
        write_atomic(folder / PART, lambda path: chunks.sink_parquet(path, metadata=about))


def _describe_part(
    captioner: Captioner, images: Path, folder: Path, settings: CaptionSettings, chunk: int
) -> None:
    """Describe what `folder` lacks."""
    reader = ImageReader(images)
    own = rows_of(len(reader), settings.part, settings.parts)
    chunks = {
        folder / f"chunk-{number:05d}.parquet": own[first : first + chunk]
        for number, first in enumerate(range(0, len(own), chunk))
    }
    missing = {path: rows for path, rows in chunks.items() if not path.exists()}
    done = len(own) - sum(map(len, missing.values()))
    if done:
        log.info("kept %d of %d images from an interrupted job", done, len(own))
    if not missing:
        return
    raw = _raw_captions(images, reader.keys[own.start : own.stop])
    engine = engines.create(captioner)
    title = f"caption {settings.dataset} {settings.part + 1}/{settings.parts}"
    with progress.bar(len(own), "images", title, done=done) as bar:
        for path, rows in missing.items():
            began = time.monotonic()
            readable = _read(reader, rows)
            found = describe(engine, readable, captioner, raw)
            found += [
                Row(reader.keys[i], kind, None, "broken")
                for i in rows
                if reader.keys[i] not in readable
                for kind in captioner.prompts
            ]
            seconds = time.monotonic() - began
            broken = len(rows) - len(readable)
            _write_chunk(path, found, images=len(rows), broken=broken, seconds=seconds)
            bar.update(len(rows))


def _read(reader: ImageReader, rows: range) -> dict[str, Image.Image]:
    """Images by key; those that cannot be read are told of, and left out."""
    found = {}
    for i in rows:
        try:
            found[reader.keys[i]] = Image.fromarray(reader.read(i))
        except ImageError as error:
            log.warning("skipped: %s", error)
    return found


def _raw_captions(images: Path, keys: list[str]) -> dict[str, str]:
    """The first raw caption of every key that has one."""
    table = pl.scan_parquet(verified(images / "captions.parquet")).filter(pl.col("kind") == "raw")
    rows = table.filter(pl.col("key").is_in(keys)).select("key", "text").collect().rows()
    return dict(reversed(rows))


def _write_chunk(path: Path, rows: list[Row], **counts: float) -> None:
    table = pl.DataFrame(rows, schema=CAPTIONS, orient="row")
    about = {ABOUT: json.dumps(counts)}
    write_atomic(path, lambda temporary: table.write_parquet(temporary, metadata=about))


def _counts(folder: Path) -> dict[str, float]:
    """Images, broken images and seconds of all chunks together."""
    each = [_about(path) for path in sorted(folder.glob("chunk-*.parquet"))]
    return {name: sum(counts[name] for counts in each) for name in ("images", "broken", "seconds")}


def _about(path: Path) -> dict[str, Any]:
    try:
        described = pl.read_parquet_metadata(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} is broken: {error}; delete it to make it anew") from error
    if ABOUT not in described:
        raise ValueError(f"{path} does not say how its captions came about: no part of `caption`")
    return json.loads(described[ABOUT])


def _take_over(captioner: PublishedCaptions, images: Path, folder: Path) -> dict[str, float]:
    """Published captions of the data set's images, as they are, and counts of the others."""
    keys = set(pl.read_parquet(verified(images / "index.parquet"), columns=["key"])["key"])
    counts = {"unknown": 0, "double": 0}
    with progress.bar(len(keys) * len(captioner.files), "captions", "published") as bar:
        rows: list[Row] = []
        number = 0
        for row in _published(captioner, keys, folder, counts):
            rows.append(row)
            bar.update()
            if len(rows) == PUBLISHED_CHUNK:
                _write_chunk(folder / f"chunk-{number:05d}.parquet", rows)
                rows, number = [], number + 1
        _write_chunk(folder / f"chunk-{number:05d}.parquet", rows)
    if any(counts.values()):
        log.info("captions of unknown images: %(unknown)d; second captions: %(double)d", counts)
    return {"images": len(keys), "broken": 0, **counts}


def _published(
    captioner: PublishedCaptions, keys: set[str], folder: Path, counts: dict[str, int]
) -> Iterator[Row]:
    """One row for each key that the published files know, in their order."""
    for kind, name in captioner.files.items():
        file = Path(
            hf_hub_download(
                captioner.id,
                name,
                repo_type="dataset",
                revision=captioner.revision,
                local_dir=folder / "hub",
            )
        )
        seen: set[str] = set()
        for number, found in enumerate(read_objects(file)):
            if captioner.key not in found or captioner.text not in found:
                raise ValueError(
                    f"object {number} of {name} in {captioner.id!r} has no {captioner.key!r} or no "
                    f"{captioner.text!r}, but: {', '.join(found)}"
                )
            key, text = str(found[captioner.key]), str(found[captioner.text]).strip()
            counts["unknown"] += key not in keys
            counts["double"] += key in seen
            if key in keys and key not in seen:
                seen.add(key)
                flags = ",".join(faults(text, "stop"))
                yield Row(key, kind, text or None, flags if text else f"{flags},dropped")


def join(images: Path, parts: list[Path], out: Path, settings: CaptionsSettings) -> None:
    """Put the parts of a data set's captions together, with its own, and report on them.

    Args:
        images: folder of the data set.
        parts: all files that `write` made of it, in any order.
        out: folder to write: `captions.parquet`, `report.json`, `report.md`.
        settings: whose captions they are, and how many images may stay without one.
    """
    about = _agreed({path: _about(path) for path in parts}, images, settings)
    origin = settings.model_dump(mode="json") | {
        "inputs": {str(i): sha256(path) for i, path in enumerate(about)},
        "own": sha256(images / "captions.parquet"),
    }
    with resumable(out, origin) as folder:
        own = pl.scan_parquet(verified(images / "captions.parquet"))
        written = _without_alike(pl.scan_parquet([*about]), own, settings)
        kinds = _kinds(settings)
        kept = written.filter(pl.col("text").is_not_null())
        whole = pl.concat([own.filter(~pl.col("kind").is_in(kinds)), kept])
        write_atomic(folder / "captions.parquet", whole.sink_parquet)
        index = pl.scan_parquet(verified(images / "index.parquet"))
        missing = {kind: _missing(index, written.filter(kind=kind)) for kind in kinds}
        report = _report(folder, written, [*about.values()], missing, settings)
        write_atomic(folder / "report.json", json.dumps(report, indent=1).encode())
        write_atomic(folder / "report.md", _as_markdown(report).encode())
        seal(folder, ["captions.parquet", "report.json", "report.md"])
        for kind, keys in missing.items():
            if len(keys) > settings.max_skipped * report["images"]:
                raise ValueError(
                    f"{len(keys)} of {report['images']} images have no {kind} caption, more than "
                    f"{settings.max_skipped:.1%}: {', '.join(keys[:20])}"
                )


def _kinds(settings: CaptionsSettings) -> list[str]:
    captioner = settings.captioner
    return [*(captioner.files if captioner.engine == "published" else captioner.prompts)]


def _agreed(
    found: Mapping[Path, Mapping[str, Any]], images: Path, settings: CaptionsSettings
) -> dict[Path, Mapping[str, Any]]:
    """Parts in order, if they are complete, alike, and of these images by this captioner.

    Raises:
        ValueError: naming the parts there are, or what one of them differs in.
    """
    ordered = dict(sorted(found.items(), key=lambda item: item[1]["part"]))
    numbers = [about["part"] for about in ordered.values()]
    count = max(about["parts"] for about in ordered.values())
    if numbers != list(range(count)):
        raise ValueError(f"parts {numbers} of captions that were written in {count}")
    wanted = settings.model_dump(mode="json", exclude={"max_skipped"}) | {
        "inputs": {name: sha256(images / f"{name}.parquet") for name in ("index", "captions")},
        "parts": count,
    }
    for path, about in ordered.items():
        for name in sorted((about.keys() | wanted.keys()) - set(OWN)):
            here, there = (json.dumps(a.get(name), sort_keys=True) for a in (about, wanted))
            if here != there:
                raise ValueError(f"{path} has {name} {here}, where the study has {there}")
    return ordered


def _without_alike(
    written: pl.LazyFrame, own: pl.LazyFrame, settings: CaptionsSettings
) -> pl.LazyFrame:
    """Captions in which a text that too many images share has given way to the raw captions.

    Published captions stay as they are.
    """
    if isinstance(settings.captioner, PublishedCaptions):
        return written
    is_own = pl.col("text").is_not_null() & ~pl.col("flags").str.contains("fallback")
    marked = written.with_columns(hash=pl.when(is_own).then(pl.col("text").hash()))
    shared = (
        marked.filter(is_own)
        .group_by("kind", "hash")
        .agg(images=pl.len())
        .filter(pl.col("images") > settings.captioner.max_alike)
        .collect(engine="streaming")
    )
    if shared.is_empty():
        return written
    raw = own.filter(kind="raw").unique("key", keep="first", maintain_order=True)
    joined = marked.join(
        shared.lazy(), on=["kind", "hash"], how="left", maintain_order="left"
    ).join(raw.select("key", raw="text"), on="key", how="left", maintain_order="left")
    alike, raw_text = pl.col("images").is_not_null(), pl.col("raw").replace("", None)
    how = pl.when(raw_text.is_null()).then(pl.lit("dropped")).otherwise(pl.lit("fallback"))
    before = pl.when(pl.col("flags") != "").then(pl.col("flags") + ",").otherwise(pl.lit(""))
    return joined.select(
        "key",
        "kind",
        text=pl.when(alike).then(raw_text).otherwise("text"),
        flags=pl.when(alike).then(before + "alike," + how).otherwise("flags"),
    )


def _missing(index: pl.LazyFrame, written: pl.LazyFrame) -> list[str]:
    """Keys of the images for which the captioner has nothing, be it replaced by a raw caption."""
    there = written.filter(pl.col("text").is_not_null() & ~pl.col("flags").str.contains("error"))
    return index.select("key").join(there, on="key", how="anti").collect()["key"].to_list()


def _report(
    folder: Path,
    written: pl.LazyFrame,
    about: list[Mapping[str, Any]],
    missing: Mapping[str, list[str]],
    settings: CaptionsSettings,
) -> dict[str, Any]:
    """Counts, speed, rates of every flag, words a caption, and some examples."""
    table = pl.scan_parquet(folder / "captions.parquet")
    flags = (
        written.select("kind", pl.col("flags").str.split(","))
        .explode("flags")
        .filter(pl.col("flags") != "")
        .group_by("kind", "flags")
        .agg(captions=pl.len())
        .sort("kind", "flags")
        .collect(engine="streaming")
    )
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
        "words": {row.pop("kind"): row for row in _words(table)},
        "examples": _examples(table),
    }


def _words(table: pl.LazyFrame) -> list[dict[str, Any]]:
    """Number of captions of each kind, and of words in them."""
    words = pl.col("text").str.count_matches(r"\S+")
    quantiles = {f"{q:.0%}": words.quantile(q, "nearest").cast(pl.Int64) for q in (0.05, 0.5, 0.95)}
    by_kind = table.group_by("kind").agg(captions=pl.len(), mean=words.mean(), **quantiles)
    return by_kind.sort("kind").collect().to_dicts()


def _examples(table: pl.LazyFrame) -> list[dict[str, str]]:
    """All captions of some images, always the same ones."""
    keys = table.select(pl.col("key").unique(maintain_order=True)).collect()["key"].to_list()
    chosen = random.Random(0).sample(keys, min(EXAMPLES, len(keys)))
    return table.filter(pl.col("key").is_in(chosen)).sort("key", "kind").collect().to_dicts()


def _as_markdown(report: Mapping[str, Any]) -> str:
    """The report, to be read."""
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
            f" {report['unknown']} captions are of images that are not here, {report['double']} of"
            " images that had one."
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
    lines += ["", "| image | kind | flags | caption |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {e['key']} | {e['kind']} | {e['flags']} | {_cell(e['text'])} |"
        for e in report["examples"]
    ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """A text inside a table of Markdown."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    command.main({"write": write, "join": join})
