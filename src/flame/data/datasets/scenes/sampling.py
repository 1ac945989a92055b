"""Scenes drawn at random, facet by facet."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from random import Random

from flame.data.datasets.scenes.options import Options
from flame.data.datasets.scenes.scene import Scene
from flame.data.datasets.scenes.words import (
    CATEGORY,
    LABELS,
    MEMBERS,
    MINORS,
    MOOD,
    OBJECTS,
    OUTDOORS,
    VALUES,
)


def labels_of(options: Options) -> list[str]:
    """Labels of the set as plain names; empty without labels."""
    if options.classify == "noun" and options.members:
        return MEMBERS[options.members]
    return LABELS[options.classify] if options.classify else []


def scenes(options: Options, rng: Random) -> Iterator[Scene]:
    """As many scenes as there are images, labels in equal numbers."""
    labels = labels_of(options)
    if options.differ:
        for _ in range(options.images // options.group):
            yield from _group(options, rng)
        return
    for index in range(options.images):
        fixed: dict[str, str] = {}
        if options.classify:
            fixed[options.classify] = labels[index % len(labels)]
        yield sample(options, rng, fixed)


def _group(options: Options, rng: Random) -> Iterator[Scene]:
    """Scenes that share all facets but those in `differ`, of which the first surely differs."""
    first = sample(options, rng, {})
    shared = {
        facet: value
        for facet, value in asdict(first).items()
        if value is not None and facet not in options.differ
    }
    facet = options.differ[0]
    values = [value for value in VALUES[facet] if value != first.noun]
    for value in rng.sample(values, options.group):
        yield sample(options, rng, shared | {facet: value})


def sample(options: Options, rng: Random, fixed: Mapping[str, str]) -> Scene:
    """A random scene, with the facets in `fixed` (facet -> plain name) set to these values."""

    def pick(facet: str, among: list[str] | None = None) -> str:
        return fixed.get(facet) or rng.choice(among or LABELS[facet])

    pairs = [pair for pair, mood in MOOD.items() if fixed.get("mood") in (None, mood)]
    light = pick("light", [light for light, _ in pairs])
    weather = fixed.get("weather")
    if "mood" in fixed:
        weather = next(weather for of_light, weather in pairs if of_light == light)
    place = pick("place", LABELS["place"] if weather in (None, "clear") else OUTDOORS)
    if weather is None:
        weather = rng.choice(LABELS["weather"]) if place in OUTDOORS else "clear"
    is_person = "action" in fixed or rng.random() < options.people
    category = options.members or ("person" if is_person else None)
    noun = pick("noun", MEMBERS[category] if category else list(OBJECTS))
    return Scene(
        noun=noun,
        tint=pick("tint"),
        minor=pick("minor", [minor for minor in MINORS if minor != noun]),
        minor_tint=pick("minor_tint", LABELS["tint"]),
        place=place,
        light=light,
        weather=weather,
        relation=pick("relation"),
        action=pick("action") if CATEGORY[noun] == "person" else None,
    )
