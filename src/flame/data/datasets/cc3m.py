"""Conceptual Captions 3M: the stable snapshot of the hub, or the links themselves."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flame.data import hub
from flame.data.datasets import Card, Sample, Skipped
from flame.data.datasets._links import LinkOptions, follow, linked, samples, survival

REVISION = "46f3d69f840e59d77d52e8decfe5baec97e94c7f"
LINES = {"train": 3_318_333, "validation": 15_840}  # of the official lists of links

CARD = Card(
    title="CC3M",
    source=f"hub: pixparse/cc3m-wds at {REVISION} (WebDataset, 22 December 2021, shortest side at "
    "most 512 pixels); or the TSV of google-research-datasets/conceptual-captions by img2dataset",
    licence="may be freely used for any purpose, although acknowledgement of Google LLC as the "
    "data source would be appreciated; the images are their owners'",
    splits={"train": 2_905_954, "validation": 13_443},
    texts="1 raw caption per image",
    notes="The release trains on exactly this snapshot. The official lists have 3,318,333 and "
    "15,840 links, many of them dead. Captions are tokenized and lowercased.",
    used_in="training of the CC3M rows",
)


class Options(LinkOptions):
    """Which pairs of CC3M."""

    source: Literal["hub", "links"] = "hub"
    """The snapshot, or a TSV of (caption, URL) without a header, named by `links`."""
    id: str = "pixparse/cc3m-wds"
    revision: str = REVISION
    split: Literal["train", "validation"] = "train"
    columns: dict[str, str | int] = Field(default={"caption": 0, "url": 1})
    keep: bool = True
    """False: a shard is deleted once it has been read; a job that is resumed fetches it again."""


def size(options: Options) -> int:
    """Number of images, or of links, some of which are dead."""
    whole = (CARD.splits if options.source == "hub" else LINES)[options.split]
    return min(options.limit or whole, whole)


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Empty: the pairs have no labels."""
    return {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample | Skipped]:
    """Pairs in the order of the shards.

    Args:
        root: folder for downloads.
        options: which pairs.
        seed: unused; nothing is random.
    """
    if options.source == "links":
        yield from linked(follow(options, root))
        return
    for number, found in enumerate(samples(_shards(root, options))):
        if options.limit is not None and number == options.limit:
            return
        yield found


def exact(options: Options) -> bool:
    """Whether `size` is exact: of links, some are dead."""
    return options.source == "hub"


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: survival of the links, or the commit."""
    if options.source == "links":
        return {"survival": survival(options, root)}
    return {"commit": hub.commit_of(_folder(root, options))}


def _folder(root: Path, options: Options) -> Path:
    return root / f"{options.id.replace('/', '--')}-{options.revision[:12]}"


def _shards(root: Path, options: Options) -> Iterator[Path]:
    """Shards of a split, fetched one by one as needed, or all at once if all are kept."""
    folder = _folder(root, options)
    pattern = f"cc3m-{options.split}-*.tar"
    place = (options.id, options.revision)
    if options.limit is None and options.keep:
        hub.download(*place, [pattern], folder)
    for name in hub.list_files(*place, folder):
        if not fnmatchcase(name, pattern):
            continue
        hub.download(*place, [name], folder)
        yield folder / name
        if not options.keep:
            (folder / name).unlink()
