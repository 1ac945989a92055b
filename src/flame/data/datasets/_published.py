"""What published data sets share: options, sizes, files of a hub or a web server."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, PositiveInt

from flame.data import hub
from flame.data.datasets import Card
from flame.runtime.checksums import sha256

Kind = Literal["raw", "short", "long"]


class Published(BaseModel):
    """Options of every published data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str = "test"
    """One of the splits on its card."""
    limit: PositiveInt | None = None
    """Number of images from the start; null: all."""


class OnHub(Published):
    """Options of a data set on the hub."""

    id: str
    """`owner/name`."""
    revision: str = "main"
    """Commit, branch or tag; the manifest records the commit."""


def expected(card: Card, options: Published) -> int:
    """Number of images in the chosen split, at most the limit."""
    whole = card.splits[options.split]
    return min(options.limit or whole, whole)


def files_of(options: OnHub, root: Path, *patterns: str) -> Path:
    """Folder with the files of the repository that match."""
    return hub.download(options.id, options.revision, patterns, root / "hub")


def commit_of(root: Path) -> dict[str, Any]:
    """For the manifest: the commit that was fetched."""
    return {"commit": hub.commit_of(root / "hub")}


def sums_of(root: Path, *addresses: str) -> dict[str, Any]:
    """For the manifest: the checksum of each download."""
    return {"sha256": {address: sha256(root / _name(address)) for address in addresses}}


def images_in(folder: Path) -> dict[str, Path]:
    """File name -> path of every image below a folder."""
    kinds = {".jpg", ".jpeg", ".png", ".webp"}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    return {path.name: path for path in found}


def image(found: dict[str, Path], name: str, folder: Path) -> bytes:
    """An image by file name.

    Raises:
        ValueError: there is none: archive and annotations do not match.
    """
    if name not in found:
        raise ValueError(
            f"{folder} has no image {name!r}: it is incomplete or belongs to another data set"
        )
    return found[name].read_bytes()


def _name(address: str) -> str:
    return unquote(PurePosixPath(urlsplit(address).path).name)
