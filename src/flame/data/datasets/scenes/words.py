"""Words and artwork of the scenes, from `words.yaml`: what can be drawn, and its English words."""

from importlib.resources import files
from typing import Any

import yaml

WORDS: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("words.yaml").read_text("utf-8"))
PEOPLE: dict[str, dict[str, str]] = WORDS["people"]
OBJECTS = {noun: emoji for nouns in WORDS["nouns"].values() for noun, emoji in nouns.items()}
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
