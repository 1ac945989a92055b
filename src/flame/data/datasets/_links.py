"""Image-text pairs in WebDataset shards, and lists of links that img2dataset turns into shards.

img2dataset needs older releases of webdataset and pandas than this package. So it is no dependency;
uv runs it in an environment of its own.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from flame.data import archives
from flame.data.datasets import Sample, Skipped
from flame.runtime.checksums import sha256
from flame.runtime.errors import known
from flame.runtime.resumable import write_atomic

log = logging.getLogger(__name__)

IMG2DATASET = "img2dataset==1.47.0"
IMAGES = ("jpg", "jpeg", "png", "webp")
IMAGE_SIZE = (
    512  # pixels of the shortest side, larger images are reduced, as in the snapshot of CC3M
)
PER_SHARD = 5000
LINKS = {"id": pl.String, "url": pl.String, "caption": pl.String}

# Pattern in img2dataset's error -> reported reason; the first match counts.
REASONS = {
    r"HTTP Error (\d+)": "HTTP {}",
    r"name resolution|Name or service|getaddrinfo|nodename|No address|idna": "no such host",
    r"timed? ?out": "timeout",
    r"certificate|SSL|TLS": "TLS",
    r"refused|reset|unreachable|[Rr]emote end closed|IncompleteRead|aborted": "connection",
    r"X-Robots-Tag": "not allowed by its site",
    r"unknown url type|no host given|InvalidURL|URL can't": "no URL",
    r"[Ii]mage decoding error|cannot identify": "no image",
    r"too small": "too small",
    r"too large": "too large",
}


class LinkOptions(BaseModel):
    """Options of every data set that is given as links."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: PositiveInt | None = None
    """Number of images or links from the start; null: all."""
    links: str | None = None
    """Path of the list: TSV, CSV, Parquet or JSON lines."""
    columns: dict[str, str | int] = Field(default={})
    """Columns of `url`, `caption` and optionally `key` in the list: name or number."""
    min_size: NonNegativeInt = 0
    """Shortest side in pixels; smaller images are left out."""
    rounds: PositiveInt = 1
    """How often links are tried; later rounds try only those that failed."""
    retries: NonNegativeInt = 2
    """Retries of a link within a round."""


# --- shards ---------------------------------------------------------------------------------------


def samples(shards: Iterable[Path]) -> Iterator[Sample | Skipped]:
    """Pairs of WebDataset shards, in order; members of one sample follow each other.

    Args:
        shards: tar files with `<key>.jpg` (or png, webp) and `<key>.txt`.

    Yields:
        The sample with its text as the caption `raw`, or why it is left out.

    Raises:
        ValueError: a shard is truncated.
    """
    seen: set[str] = set()
    for shard in shards:
        for key, members in groups(shard):
            image = next((members[kind] for kind in IMAGES if kind in members), None)
            text = utf8_or_none(members.get("txt", b""))
            if key in seen:
                yield Skipped(key, "duplicate key")
            elif image is None:
                yield Skipped(key, "no image")
            elif text is None:
                yield Skipped(key, "caption is not UTF-8")
            elif not text.strip():
                yield Skipped(key, "no caption")
            else:
                yield Sample(key, image, {"raw": [text.strip()]})
            seen.add(key)


def utf8_or_none(text: bytes) -> str | None:
    """Decoded text, or None if it is not UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return None


def groups(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by extension of every sample; a repeated extension starts a new sample.

    Raises:
        ValueError: the shard is truncated.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(shard) as tar:
            for member in archives.whole_members(tar, shard):
                if not member.isreg():
                    continue
                place = PurePosixPath(member.name.removeprefix("./"))
                stem, _, kind = place.name.partition(".")
                # The folder counts, as in webdataset; our keys have no "/".
                found = "_".join([*place.parts[:-1], stem]).replace(".", "_")
                if members and (found != key or kind.lower() in members):
                    yield key, members
                    members = {}
                file = tar.extractfile(member)
                assert file is not None
                key, members[kind.lower()] = found, file.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is not a complete tar ({error}): fetch it again") from error
    if members:
        yield key, members


# --- links ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """Links tried, images gained, and why the other links failed."""

    asked: int
    gained: int
    dead: dict[str, int]


def follow(options: LinkOptions, root: Path) -> Path:
    """Fetch the images of a list of links; resumes an earlier run.

    Args:
        options: which list, and how.
        root: folder of this source.

    Returns:
        Folder of the rounds, with `survival.json`: number of links, alive, and dead by reason.
    """
    folder = _place(options, root)
    rounds: list[Round] = []
    asked = read_list(Path(str(options.links)), options)
    for number in range(options.rounds):
        found = _round(asked, folder / f"round-{number:02d}", options)
        dead = Counter(found.filter(~pl.col("alive"))["reason"].to_list())
        rounds.append(Round(len(asked), len(asked) - dead.total(), dict(dead.most_common())))
        log.info("round %d: %s", number + 1, as_line(rounds[-1]))
        asked = asked.join(found.filter(~pl.col("alive")), on="id", how="semi")
        if asked.is_empty():
            break
    report = _summed(rounds)
    write_atomic(folder / "survival.json", json.dumps(report, indent=1).encode())
    return folder


def survival(options: LinkOptions, root: Path) -> dict[str, Any]:
    """How many links are alive and why the others are dead, after `follow`."""
    return json.loads((_place(options, root) / "survival.json").read_text())


def _place(options: LinkOptions, root: Path) -> Path:
    """Folder for the images of a list of links; one per list."""
    if options.links is None:
        raise ValueError("links: a path to a list is required")
    path = Path(options.links)
    if not path.is_file():
        raise ValueError(f"links: there is no file {options.links!r}")
    decisive = options.model_dump_json(include={"limit", "columns", "min_size"})
    name = hashlib.sha256((sha256(path) + decisive).encode()).hexdigest()[:16]
    return root / f"links-{name}"


def _summed(rounds: Sequence[Round]) -> dict[str, Any]:
    """All rounds together, as shares of the links in the first round."""
    total, alive = rounds[0].asked, sum(each.gained for each in rounds)
    return {
        "total": total,
        "alive": alive,
        "share": round(alive / total, 4) if total else 0.0,
        "dead": rounds[-1].dead,
        "rounds": [asdict(each) for each in rounds],
    }


def as_line(each: Round) -> str:
    """One round as a log line."""
    dead = ", ".join(f"{count} {reason}" for reason, count in each.dead.items()) or "none"
    return f"{each.gained} of {each.asked} links have an image; dead: {dead}"


def read_list(path: Path, options: LinkOptions) -> pl.DataFrame:
    """A list of links as (id, url, caption); the id is its key, or the number of its line."""
    kind = "".join(path.suffixes[-1:]).lower()
    headed = any(isinstance(column, str) for column in options.columns.values())
    match kind:
        case ".tsv" | ".csv" | ".txt":
            separator = "," if kind == ".csv" else "\t"
            # Captions contain single quotation marks, which are no quoting in a TSV.
            quote = '"' if kind == ".csv" else None
            table = pl.read_csv(
                path, separator=separator, quote_char=quote, has_header=headed, infer_schema=False
            )
        case ".parquet":
            table = pl.read_parquet(path)
        case ".jsonl" | ".ndjson":
            table = pl.read_ndjson(path)
        case _:
            raise ValueError(
                f"{path}: {kind!r} is not a known format; known: tsv, csv, parquet, jsonl"
            )
    table = table.head(options.limit) if options.limit else table
    chosen = {name: _column(table, place, path) for name, place in options.columns.items()}
    key = chosen.get("key", pl.Series([f"{i:09d}" for i in range(len(table))], dtype=pl.String))
    caption = chosen["caption"].cast(pl.String).fill_null("")
    return pl.DataFrame([key.cast(pl.String), chosen["url"], caption], schema=LINKS)


def _column(table: pl.DataFrame, place: str | int, path: Path) -> pl.Series:
    if isinstance(place, int) and 0 <= place < table.width:
        return table.to_series(place)
    if place in table.columns:
        return table[str(place)]
    raise ValueError(f"{path} has no column {known(place, table.columns)}")


def _round(asked: pl.DataFrame, folder: Path, options: LinkOptions) -> pl.DataFrame:
    """Try links once; result of each as (id, alive, reason)."""
    shards = (
        folder / "shards"
    )  # img2dataset takes every JSON file in its folder for a finished shard
    if not (folder / "done.json").exists():
        shards.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "links.parquet", asked.write_parquet)
        _run_img2dataset(folder / "links.parquet", shards, options)
    found = [_outcome(path) for path in sorted(shards.glob("*.parquet"))]
    came = sum(map(len, found))
    if came != len(asked):
        raise ValueError(
            f"img2dataset reported {came} of {len(asked)} links in {shards}, see above: run again"
        )
    write_atomic(folder / "done.json", json.dumps({"asked": len(asked)}).encode())
    return pl.concat(found)


def _outcome(shard: Path) -> pl.DataFrame:
    table = pl.read_parquet(shard, columns=["id", "status", "error_message"])
    messages = zip(table["status"], table["error_message"], strict=True)
    alive = table["status"] == "success"
    reasons = ["" if status == "success" else reason(message) for status, message in messages]
    return pl.DataFrame({"id": table["id"], "alive": alive, "reason": reasons})


def reason(message: str | None) -> str:
    """Why a link is dead, as a category that can be counted."""
    for pattern, words in REASONS.items():
        if found := re.search(pattern, message or ""):
            return words.format(*found.groups())
    return "other"


def _run_img2dataset(links: Path, shards: Path, options: LinkOptions) -> None:
    settings = {
        "url_list": links,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": '["id"]',
        "output_folder": shards,
        "output_format": "webdataset",
        "number_sample_per_shard": PER_SHARD,
        "image_size": IMAGE_SIZE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "min_image_size": options.min_size,
        "encode_quality": 95,
        "retries": options.retries,
        "incremental_mode": "incremental",
        "processes_count": len(os.sched_getaffinity(0)),
        "thread_count": 32,
        "enable_wandb": False,
    }
    command = [*tool(), *(f"--{name}={value}" for name, value in settings.items())]
    log.info("%s", shlex.join(command))
    # In a process group of its own, so that its workers are stopped with it.
    process = subprocess.Popen(
        command,
        stdout=sys.stderr,
        start_new_session=True,
        env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if code != 0:
        raise ValueError(
            f"img2dataset failed ({code}), see above; finished shards are kept, run again"
        )


def tool() -> list[str]:
    """The command of img2dataset: `FLAME_IMG2DATASET`, or uv."""
    if named := os.environ.get("FLAME_IMG2DATASET"):
        return shlex.split(named)
    if shutil.which("uv"):
        uv = ["uv"]
    elif importlib.util.find_spec("uv"):
        uv = [sys.executable, "-m", "uv"]
    else:
        raise ValueError(
            "links are fetched by img2dataset in an environment of its own: install uv (pip "
            f"install uv), or set FLAME_IMG2DATASET to the command of {IMG2DATASET}"
        )
    return [*uv, "tool", "run", "--from", IMG2DATASET, "img2dataset"]


def linked(folder: Path) -> Iterator[Sample | Skipped]:
    """Pairs of a list of links, round by round, in the order of the list."""
    for shard in sorted(folder.glob("round-*/shards/*.parquet")):
        table = pl.read_parquet(shard, columns=["id", "key", "status", "caption"])
        rows = table.filter(pl.col("status") == "success").sort("id").iter_rows(named=True)
        with tarfile.open(shard.with_suffix(".tar")) as tar:
            for row in rows:
                key = row["id"].replace(".", "_").replace("/", "_")
                if not (row["caption"] or "").strip():
                    yield Skipped(key, "no caption")
                    continue
                file = tar.extractfile(f"{row['key']}.jpg")
                assert file is not None
                yield Sample(key, file.read(), {"raw": [row["caption"].strip()]})
