"""What published data sets have in common: options, sizes, files of a hub or of the web."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, PositiveInt

from flame.data import hub
from flame.data.datasets import Card
from flame.runtime.checksums import sha256

Kind = Literal["raw", "short", "long"]


class Published(BaseModel):
    """What every published set may be asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str = "test"
    """Which of the splits on its card."""
    limit: PositiveInt | None = None
    """First images; null: all."""


class OnHub(Published):
    """The same, of a repository of the hub."""

    id: str
    """`owner/name`."""
    revision: str = "main"
    """Hash of a commit, or a branch or tag; the manifest tells which commit it was."""


def expected(card: Card, options: Published) -> int:
    """Images that the chosen split of a card has, or the first ones of it that were asked for."""
    whole = card.splits[options.split]
    return min(options.limit or whole, whole)


def files_of(options: OnHub, root: Path, *patterns: str) -> Path:
    """Folder with files of the set's repository."""
    return hub.download(options.id, options.revision, patterns, root / "hub")


def commit_of(root: Path) -> dict[str, Any]:
    """For the manifest: the commit that was fetched."""
    return {"commit": hub.commit_of(root / "hub")}


def sums_of(root: Path, *addresses: str) -> dict[str, Any]:
    """For the manifest: the checksum of what came from each address."""
    return {"sha256": {address: sha256(root / _name(address)) for address in addresses}}


def images_in(folder: Path) -> dict[str, Path]:
    """File name -> path of every image in a folder, at any depth."""
    kinds = {".jpg", ".jpeg", ".png", ".webp"}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    return {path.name: path for path in found}


def image(found: dict[str, Path], name: str, folder: Path) -> bytes:
    """The image of a name.

    Raises:
        ValueError: it is not in the folder: the archive and its annotations do not match.
    """
    if name not in found:
        raise ValueError(f"{folder} has no image {name!r}: it is not whole, or not of this set")
    return found[name].read_bytes()


def _name(address: str) -> str:
    return unquote(PurePosixPath(urlsplit(address).path).name)
