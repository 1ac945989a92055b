"""Benchmarks of the hub organization clip-benchmark: WebDataset shards of one layout.

`<split>/nshards.txt` has the number of shards `<split>/0.tar` and so on. A sample is an image and
`.cls` (class number) or `.txt` (captions, one per line). Class names and templates come from the
package clip-benchmark, class names that it lacks from `classnames.txt` beside the shards.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from flame.data.datasets import Card, Sample, Skipped
from flame.data.datasets._links import IMAGES, groups, utf8_or_none
from flame.data.datasets._published import Kind, OnHub, commit_of, expected, files_of

NAMES, TEMPLATES = "classnames", "zeroshot_classification_templates"


class HubOptions(OnHub):
    """Which images of a benchmark."""

    split: Literal["train", "test"] = "test"


class OnlyTest(OnHub):
    """Which images of a benchmark whose repository has only this split."""

    split: Literal["test"] = "test"


class CaptionOptions(OnlyTest):
    """Which images of a retrieval benchmark."""

    kind: Kind = "short"
    """Caption kind; decides the prompt that they are embedded with. release: long"""


@dataclass(frozen=True)
class Classification:
    """Images labelled with number and name of their class.

    Args:
        card: of the set.
        templates: its key among the package's templates.
        names: its key among the package's class names; None: `classnames.txt` of the repository.
    """

    card: Card
    templates: str
    names: str | None = None

    def size(self, options: HubOptions | OnlyTest) -> int:
        """Number of images."""
        return expected(self.card, options)

    def read(
        self, root: Path, options: HubOptions | OnlyTest, seed: int
    ) -> Iterator[Sample | Skipped]:
        """Images in the order of the shards.

        Args:
            root: folder for downloads.
            options: which images.
            seed: unused; nothing is random.

        Raises:
            ValueError: a class number has no name.
        """
        labels = numbered(self.class_names(root, options))
        for key, encoded, members in _samples(root, options):
            number = members.get("cls", b"").decode(errors="replace").strip()
            if encoded is None or not number:
                yield Skipped(key, "no image" if encoded is None else "no class")
            elif not number.isdigit() or int(number) >= len(labels):
                raise ValueError(
                    f"{options.id}: image {key!r} is of class {number!r}, of {len(labels)} classes"
                )
            else:
                yield Sample(key, encoded, {}, labels[int(number)])

    def classes(self, root: Path, options: HubOptions | OnlyTest) -> dict[str, list[str]]:
        """Label -> every template filled with the name of the class."""
        names = self.class_names(root, options)
        return filled(numbered(names), names, packaged("en", TEMPLATES)[self.templates])

    def report(self, root: Path, options: HubOptions | OnlyTest) -> dict[str, Any]:
        """Extra fields of the manifest: the commit."""
        return commit_of(root)

    def class_names(self, root: Path, options: HubOptions | OnlyTest) -> list[str]:
        """English names, in the order of the class numbers."""
        if self.names:
            return packaged("en", NAMES)[self.names]
        text = (files_of(options, root, f"{NAMES}.txt") / f"{NAMES}.txt").read_text("utf-8")
        return [line.strip() for line in text.splitlines()]


@dataclass(frozen=True)
class Retrieval:
    """Images with several captions each."""

    card: Card

    def size(self, options: CaptionOptions) -> int:
        """Number of images."""
        return expected(self.card, options)

    def read(self, root: Path, options: CaptionOptions, seed: int) -> Iterator[Sample | Skipped]:
        """Images in the order of the shards, each with all of its captions, even a sixth one.

        Args:
            root: folder for downloads.
            options: which images.
            seed: unused; nothing is random.
        """
        for key, encoded, members in _samples(root, options):
            # A newline within a caption is written as the two characters \n, and stays so.
            text = utf8_or_none(members.get("txt", b""))
            captions = [line for line in (text or "").splitlines() if line.strip()]
            if text is None:
                yield Skipped(key, "captions are not UTF-8")
            elif encoded is None or not captions:
                yield Skipped(key, "no image" if encoded is None else "no caption")
            else:
                yield Sample(key, encoded, {options.kind: captions})

    def classes(self, root: Path, options: CaptionOptions) -> dict[str, list[str]]:
        """Empty: the images have no labels."""
        return {}

    def report(self, root: Path, options: CaptionOptions) -> dict[str, Any]:
        """Extra fields of the manifest: the commit."""
        return commit_of(root)


def numbered(names: Sequence[str]) -> list[str]:
    """Labels of number and name: classes of ImageNet share names, and labels sort by number."""
    return [f"{number:04d} {name}" for number, name in enumerate(names)]


def filled(
    labels: Sequence[str], names: Sequence[str], templates: Sequence[str]
) -> dict[str, list[str]]:
    """Label -> every template filled with the name of the class, as clip_benchmark fills it."""
    return {
        label: [template.format(c=name) for template in templates]
        for label, name in zip(labels, names, strict=True)
    }


@cache
def packaged(language: str, what: str) -> dict[str, list[str]]:
    """Class names or templates of every data set in the package clip-benchmark.

    Args:
        language: code used by the package: jp for Japanese, cn for Chinese.
        what: `NAMES` or `TEMPLATES`.
    """
    folder = resources.files("clip_benchmark") / "datasets"
    content: dict[str, list[str]] = json.loads(
        (folder / f"{language}_{what}.json").read_text("utf-8")
    )
    return content


def _samples(
    root: Path, options: HubOptions | OnlyTest
) -> Iterator[tuple[str, bytes | None, dict[str, bytes]]]:
    """Key, image and members of every sample, up to the limit."""
    found = (sample for shard in _shards(root, options) for sample in groups(shard))
    for key, members in islice(found, options.limit):
        yield key, next((members[kind] for kind in IMAGES if kind in members), None), members


def _shards(root: Path, options: HubOptions | OnlyTest) -> Iterator[Path]:
    """Tar files of a split, all fetched at once, or one by one if there is a limit."""
    split = options.split
    folder = files_of(options, root, f"{split}/nshards.txt")
    count = int((folder / split / "nshards.txt").read_text())
    shards = [f"{split}/{number}.tar" for number in range(count)]
    if options.limit is None:
        files_of(options, root, *shards)
    for shard in shards:
        yield files_of(options, root, shard) / shard
