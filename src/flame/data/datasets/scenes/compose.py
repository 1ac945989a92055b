"""Scenes for compositionality: two captions or two pictures that differ by a minimal edit.

SugarCrepe asks which of two captions of a picture is true; the false one adds, replaces or swaps a
thing (Hsieh et al., 2023). Winoground asks which caption belongs to which of two pictures, where
both captions have the same words in a different order (Thrush et al., 2022). The caption forms are
under `compose` in `words.yaml`.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from random import Random

from flame.data.datasets.scenes.captions import sentence, with_article
from flame.data.datasets.scenes.options import Options
from flame.data.datasets.scenes.sampling import sample
from flame.data.datasets.scenes.scene import Scene
from flame.data.datasets.scenes.words import LABELS, MINORS, OBJECTS, OPPOSITE, WORDS

# (section of words.yaml, plain name) -> the synonym that both captions use.
Said = dict[tuple[str, str], str]


def examples(
    options: Options, rng: Random, words: Random
) -> Iterator[tuple[str, Scene, dict[str, list[str]]]]:
    """Key, scene and captions of every picture.

    Args:
        options: a set with `compose`.
        rng: draws the scenes.
        words: draws forms, synonyms and false words.

    Yields:
        With `winoground` both pictures of a pair in turn, each with its caption (`positive`);
        otherwise a picture with a true caption (`positive`) and a false one (`negative`).
    """
    ways = WORDS["compose"][options.compose]
    is_paired = options.compose == "winoground"
    for index in range(options.images // (1 + is_paired)):
        scene = _scene(options, rng)
        # All ways equally often, not at random.
        way = ways[index % len(ways)]
        said = {
            (section, name): words.choice(entry["words"] if section != "relations" else entry)
            for section in ("tints", "places", "relations")
            for name, entry in WORDS[section].items()
        }
        absent = words.choice(_absent(scene))
        edited = _edit(scene, way["change"], absent, words)
        key = f"{options.split}-{index:06d}"
        positive = _tell(way["positive"], scene, said, absent)
        other = _tell(way.get("negative", way["positive"]), edited, said, absent)
        if is_paired:
            yield f"{key}-0", scene, {"positive": [positive]}
            yield f"{key}-1", edited, {"positive": [other]}
        else:
            yield key, scene, {"positive": [positive], "negative": [other]}


def _scene(options: Options, rng: Random) -> Scene:
    """A random scene of two objects that differ in tint and look clearly different."""
    objects = options.model_copy(update={"people": 0.0})
    while True:
        scene = sample(objects, rng, {})
        shown, held = {scene.noun, scene.minor}, _held(scene)
        if scene.tint == scene.minor_tint or shown & held or _is_alike(*shown):
            continue
        # Where the objects change places, the main one must be seen as a minor one elsewhere.
        if options.compose != "swap_obj" or scene.noun in MINORS:
            return scene


def _held(scene: Scene) -> set[str]:
    """Nouns that the background itself may show."""
    return set(WORDS["places"][scene.place].get("holds", []))


def _is_alike(noun: str, other: str) -> bool:
    return any(noun in group and other in group for group in WORDS["alike"])


def _absent(scene: Scene) -> list[str]:
    """Nouns that are certainly not in the picture, not even under another name."""
    return [
        noun
        for noun in OBJECTS
        if noun not in {scene.noun, scene.minor} | _held(scene)
        and not any(_is_alike(noun, shown) for shown in (scene.noun, scene.minor))
    ]


def _edit(scene: Scene, change: str, absent: str, rng: Random) -> Scene:
    """The scene after one minimal edit.

    Args:
        scene: what is shown.
        change: facet that gets another value; `tints` or `nouns` for a swap between the two
            objects; or `nothing`.
        absent: noun that is not shown.
        rng: draws another tint.
    """
    match change:
        case "tint" | "minor_tint":
            others = [tint for tint in LABELS["tint"] if tint != asdict(scene)[change]]
            return replace(scene, **{change: rng.choice(others)})
        case "noun" | "minor":
            return replace(scene, **{change: absent})
        case "relation":
            # Only the opposite is certainly false: what is left of an object may also be above it.
            return replace(scene, relation=OPPOSITE[scene.relation])
        case "tints":
            return replace(scene, tint=scene.minor_tint, minor_tint=scene.tint)
        case "nouns":
            return replace(scene, noun=scene.minor, minor=scene.noun)
    assert change == "nothing", change
    return scene


def _tell(form: str, scene: Scene, said: Said, absent: str) -> str:
    main = f"{said['tints', scene.tint]} {scene.noun}"
    slots = {
        "a_noun": with_article(scene.noun),
        "main": main,
        "a_main": with_article(main),
        "minor_noun": scene.minor,
        "minor": f"{said['tints', scene.minor_tint]} {scene.minor}",
        "a_absent": with_article(absent),
        "relation": said["relations", scene.relation],
        "inverse": said["relations", OPPOSITE[scene.relation]],
        "place": said["places", scene.place],
    }
    return sentence(form, slots)
