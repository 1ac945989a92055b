"""Words and artwork of the scenes, from `words.yaml`: what can be drawn, and its English words."""

from importlib.resources import files
from typing import Any

import yaml

WORDS: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("words.yaml").read_text("utf-8"))
PEOPLE: dict[str, dict[str, str]] = WORDS["people"]
OBJECTS = {noun: emoji for nouns in WORDS["nouns"].values() for noun, emoji in nouns.items()}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MINORS: list[str] = WORDS["minors"]
MEMBERS = {category: list(nouns) for category, nouns in WORDS["nouns"].items()} | {
    "person": list(next(iter(PEOPLE.values())))
}
CATEGORY = {noun: category for category, nouns in MEMBERS.items() for noun in nouns}
OUTDOORS = [place for place, entry in WORDS["places"].items() if not entry.get("indoors")]
MOOD = {tuple(pair): mood for mood, entry in WORDS["moods"].items() for pair in entry["from"]}
LABELS = {
    "noun": list(CATEGORY),
    "action": list(PEOPLE),
    **{
        facet: list(WORDS[f"{facet}s"])
        for facet in ("tint", "place", "relation", "mood", "light", "weather")
    },
}
# Facet in which the images of a group may differ -> its values.
VALUES = {"minor": MINORS, "minor_tint": LABELS["tint"]} | {
    facet: LABELS[facet] for facet in ("relation", "tint", "light", "weather")
}
