"""Captions and class texts of a scene in English; `languages` has those in other languages."""

from collections.abc import Mapping
from random import Random

from flame.data.datasets.scenes import languages
from flame.data.datasets.scenes.options import Options
from flame.data.datasets.scenes.scene import Scene
from flame.data.datasets.scenes.words import CATEGORY, OPPOSITE, WORDS


def describe(scene: Scene, options: Options, rng: Random) -> dict[str, list[str]]:
    """Captions of a scene: kind -> the number of texts that the options set."""
    num_short = options.short + (rng.random() < options.extra_short)
    if options.language != "en":
        texts = languages.short(scene, options.language, num_short, rng)
        return {"short": texts} if texts else {}
    forms = {
        "raw": rng.sample(WORDS["raw"], options.raw),
        "short": rng.sample(WORDS["short"], num_short),
    }
    captions = {
        "raw": [form.format_map(_slots(scene, rng)) for form in forms["raw"]],
        "short": [sentence(form, _slots(scene, rng)) for form in forms["short"]],
        "long": [_long(scene, options.grammars, rng) for _ in range(options.long)],
    }
    return {kind: texts for kind, texts in captions.items() if texts}


def class_texts(facet: str, label: str, language: str) -> list[str]:
    """Class templates of a facet, filled with the label in the language."""
    if language != "en":
        return languages.class_texts(label, language)
    entry = WORDS[f"{facet}s"].get(label, {}) if facet in ("place", "light", "weather") else {}
    name = entry.get("label") or entry.get("words", [label])[0]
    slots = {"class": name, "a_class": with_article(name)}
    return [text.format_map(slots) for text in WORDS["templates"][facet]]


def _long(scene: Scene, grammars: str, rng: Random) -> str:
    first, *others = rng.choice(WORDS["long"][grammars])
    slots = _slots(scene, rng)
    return " ".join(sentence(form, slots) for form in [first, *rng.sample(others, len(others))])


def _slots(scene: Scene, rng: Random) -> dict[str, str]:
    """Slot of the grammar -> words, with random synonyms."""

    def say(facet: str, name: str) -> str:
        return rng.choice(WORDS[facet][name]["words"])

    is_person = scene.action is not None
    tint = say("tints", scene.tint)
    main = f"{scene.noun} dressed in {tint}" if is_person else f"{tint} {scene.noun}"
    mood = say("moods", scene.mood)
    return {
        "noun": scene.noun,
        "tint": tint,
        "main": main,
        "a_main": with_article(main),
        "minor_noun": scene.minor,
        "minor": (minor := f"{say('tints', scene.minor_tint)} {scene.minor}"),
        "a_minor": with_article(minor),
        "category": rng.choice(WORDS["categories"][CATEGORY[scene.noun]]),
        "doing": f" {scene.action}" if is_person else "",
        "act": f"is {scene.action}" if is_person else rng.choice(WORDS["stillness"]),
        "relation": rng.choice(WORDS["relations"][scene.relation]),
        "at": WORDS["sides"][scene.relation],
        "opposite": WORDS["sides"][OPPOSITE[scene.relation]],
        "place": say("places", scene.place),
        "light": say("lights", scene.light),
        "weather": say("weathers", scene.weather),
        "mood": mood,
        "a_mood": with_article(mood),
        "colour": tint,
        "number": str(rng.randint(100, 9999)),
    }


def sentence(form: str, slots: Mapping[str, str]) -> str:
    """A form with its slots (name -> words) filled, capitalized."""
    text = form.format_map(slots)
    return text[0].upper() + text[1:]


def with_article(phrase: str) -> str:
    """A phrase with its article "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
