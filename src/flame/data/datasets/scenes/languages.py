"""Short captions and class texts in languages other than English, from `languages.yaml`.

Names of objects are those that the PyPI package emoji (Unicode CLDR) has for the emoji of the
artwork. No form needs agreement of gender, number or case, whatever fills it.
"""

from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

import emoji
import yaml

from flame.data.datasets.scenes.scene import Scene
from flame.data.datasets.scenes.words import OBJECTS, PEOPLE

LEXICON: dict[str, dict[str, Any]] = yaml.safe_load(
    files(__package__).joinpath("languages.yaml").read_text("utf-8")
)
PERSONS = {"woman": "👩", "man": "👨"}  # names of persons without an action
TOLD = ("place", "light", "relation")
VARIATION = "\ufe0f"  # requests colour; some emoji of the package have it, others do not


def num_forms(language: str) -> int:
    """Number of forms of a short caption."""
    return len(LEXICON[language]["short"])


def short(scene: Scene, language: str, num: int, rng: Random) -> list[str]:
    """Short captions of different forms: each names both objects with their tints, and the place.

    Args:
        scene: what to describe.
        language: a language of `LEXICON`.
        num: number of captions.
        rng: draws the forms.
    """
    words = LEXICON[language]
    person = words["person"] if scene.action else words["object"]
    tint, minor_tint = (words["tints"][tint] for tint in (scene.tint, scene.minor_tint))
    slots = {
        "main": person.format(noun=name(scene.noun, language, scene.action), tint=tint),
        "minor": words["object"].format(noun=name(scene.minor, language), tint=minor_tint),
        **{facet: words[f"{facet}s"][getattr(scene, facet)] for facet in TOLD},
    }
    texts = (form.format_map(slots) for form in rng.sample(words["short"], num))
    return [text[0].upper() + text[1:] for text in texts]


def class_texts(noun: str, language: str) -> list[str]:
    """Class templates of the language, filled with the name of a noun."""
    return [
        text.format_map({"class": name(noun, language)}) for text in LEXICON[language]["templates"]
    ]


@cache
def name(noun: str, language: str, action: str | None = None) -> str:
    """Name of a noun, or of a person in an action, in a language.

    Args:
        noun: plain name, as in `words.yaml`.
        language: a language of `LEXICON`.
        action: what the person does; None for objects and for a person without an action.
    """
    own = LEXICON[language]["names"].get(f"{noun} {action}" if action else noun)
    if own:
        return own
    emoji.config.load_language(language)
    character = PEOPLE[action][noun] if action else (PERSONS | OBJECTS)[noun]
    bare = character.removesuffix(VARIATION)
    entry = next(emoji.EMOJI_DATA[c] for c in (bare, bare + VARIATION) if c in emoji.EMOJI_DATA)
    words = entry[language].strip(":").replace("_", " ").split(" ")
    if LEXICON[language].get("capitals"):
        # The package has lower case only. The last word is a noun, and so is the first one
        # unless it is an adjective, which begins the caption.
        words = [w[0].upper() + w[1:] if w in (words[0], words[-1]) else w for w in words]
    return " ".join(words)
