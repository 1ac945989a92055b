"""Parts of a data set's captions -> one table with the captions it came with."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from flame.captioning.parts import COUNTS, description
from flame.data import captions
from flame.runtime.checksums import digest, verified
from flame.runtime.parts import agreed
from flame.runtime.resumable import write_atomic
from flame.study.schema.data import PublishedCaptions
from flame.study.settings import CaptionsSettings

# Fields in which the parts of one set may differ.
OWN = ("part", "made_with", "chunk", "seconds", *COUNTS)


def inputs(images: Path) -> dict[str, str]:
    """Digests of the tables of a data set that captioning reads."""
    return {name: digest(images / f"{name}.parquet") for name in ("index", "captions")}


def kinds(settings: CaptionsSettings) -> list[str]:
    """Kinds of captions that the captioner writes."""
    captioner = settings.captioner
    return [*(captioner.files if captioner.engine == "published" else captioner.prompts)]


def ordered(
    parts: Sequence[Path], images: Path, settings: CaptionsSettings
) -> dict[Path, Mapping[str, Any]]:
    """Parts in order, each with its description.

    Raises:
        ValueError: a part is missing or given twice, differs from the others, or is of other images
            or another captioner.
    """
    wanted = settings.model_dump(mode="json", exclude={"max_skipped"}) | {"inputs": inputs(images)}
    return agreed({path: description(path) for path in parts}, OWN, wanted)


def write_table(
    parts: Sequence[Path], images: Path, out: Path, settings: CaptionsSettings
) -> pl.LazyFrame:
    """Write the new captions, and the data set's own captions of all other kinds, to `out`.

    Args:
        parts: in order.
        images: folder of the data set.
        out: Parquet file to write.
        settings: captioner and its limits.

    Returns:
        Rows of all parts after `replace_shared`, including those without a text.
    """
    own = captions.scan(images / captions.FILE)
    written = replace_shared(pl.scan_parquet([*parts]), own, settings)
    kept = written.filter(pl.col("text").is_not_null())
    whole = pl.concat([own.filter(~pl.col("kind").is_in(kinds(settings))), kept])
    write_atomic(out, partial(whole.sink_parquet, row_group_size=captions.ROW_GROUP))
    return written


def replace_shared(
    written: pl.LazyFrame, own: pl.LazyFrame, settings: CaptionsSettings
) -> pl.LazyFrame:
    """Captions in which a text shared by too many images is replaced by the raw captions.

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
    raw = captions.first_of_kind(own, "raw")
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


def without_caption(images: Path, written: pl.LazyFrame, kind: str) -> list[str]:
    """Keys of the images without a caption of this kind by the captioner.

    Includes images whose raw caption is used because the engine failed.
    """
    index = pl.scan_parquet(verified(images / "index.parquet"))
    there = written.filter(
        pl.col("kind") == kind,
        pl.col("text").is_not_null() & ~pl.col("flags").str.contains("error"),
    )
    return index.select("key").join(there, on="key", how="anti").collect()["key"].to_list()


def check_missing(
    missing: Mapping[str, Sequence[str]], images: int, settings: CaptionsSettings
) -> None:
    """Fail if too many images have no caption.

    Args:
        missing: kind -> keys of the images without one.
        images: number of all images.
        settings: share of images that may have none.

    Raises:
        ValueError: more than `max_skipped` of the images, with some of their keys.
    """
    for kind, keys in missing.items():
        if len(keys) > settings.max_skipped * images:
            raise ValueError(
                f"{len(keys)} of {images} images have no {kind} caption, more than "
                f"{settings.max_skipped:.1%}: {', '.join(keys[:20])}"
            )
