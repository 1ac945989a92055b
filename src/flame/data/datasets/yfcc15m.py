"""YFCC15M: one of three subsets of YFCC100M of that name, from links or shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flame.data.datasets import Card, Sample, Skipped
from flame.data.datasets._links import LinkOptions, follow, linked, samples, survival

CARD = Card(
    title="YFCC15M",
    source="no stable copy on a hub: a list of links (DeCLIP's label file, or OpenAI's subset with "
    "the URLs of YFCC100M) by img2dataset, or WebDataset shards that lie in a folder",
    licence="of each image: the Creative Commons licence that its uploader chose",
    # The option `which` chooses one of them.
    splits={"release": 15_061_521, "declip": 15_388_848, "openai": 14_829_396},
    texts="1 raw caption per image",
    needs="a list of links or shards: nothing can be downloaded automatically",
    notes="Three data sets share this name. `release`: the 15,061,521 pairs of the official "
    "release, whose images are not published. `declip`: the label file of DeCLIP, which the "
    "paper cites; 15,388,848 lines (Sense-GVT/DeCLIP, issue 28; not verified by us). "
    "`openai`: the subset of CLIP, 14,829,396; the two have 6,642,077 images in common (same "
    "issue). The manifest records which one was used.",
    used_in="training of the YFCC15M rows",
)


class Options(LinkOptions):
    """Which pairs of which YFCC15M."""

    which: Literal["release", "declip", "openai"] = "release"
    """Which of the three; determines the expected number of pairs."""
    source: Literal["shards", "links"] = "shards"
    shards: str | None = None
    """Folder with the tar shards; null: `shards` in the folder of this source."""
    columns: dict[str, str | int] = Field(default={"url": "url", "caption": "caption"})


def size(options: Options) -> int:
    """Number of images, or of links, some of which are dead."""
    whole = CARD.splits[options.which]
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
    """False: the files are placed by hand, so their number is not known."""
    return False


def report(root: Path, options: Options) -> dict[str, Any]:
    """Extra fields of the manifest: which of the sets it is, and survival of the links."""
    fields: dict[str, Any] = {"which": options.which}
    if options.source == "links":
        fields["survival"] = survival(options, root)
    return fields


def _shards(root: Path, options: Options) -> list[Path]:
    folder = Path(options.shards) if options.shards else root / "shards"
    found = sorted(folder.glob("*.tar"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        raise ValueError(
            f"please place the tar shards of YFCC15M (WebDataset: <key>.jpg and <key>.txt) in "
            f"{folder}; or take a list of links: source: links, links: <path>"
        )
    return found
