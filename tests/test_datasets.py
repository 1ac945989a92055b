"""What every data set promises, and that scenes show and tell the same facets."""

import io
from collections import Counter
from dataclasses import asdict, astuple
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from pydantic import ValidationError

from flame import datasets
from flame.datasets import scenes

FACETS = {
    "tint": "tints",
    "place": "places",
    "light": "lights",
    "weather": "weathers",
    "mood": "moods",
}


def options(**changes):
    return scenes.Options(
        **{"split": "train", "images": 40, "raw": 1, "short": 1, "long": 1} | changes
    )


def points(count=200, **changes):
    """Scenes without their pictures."""
    return list(scenes._scenes(options(images=count, **changes), Random(0)))


@pytest.fixture(scope="module")
def samples():
    return list(scenes.read(Path(), options(), seed=0))


def test_unknown_data_set_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'scene'; known are .*scenes"):
        datasets.module("scene")
    assert datasets.module("scenes") is scenes


def test_same_seed_gives_the_same_samples(samples):
    assert list(scenes.read(Path(), options(), seed=0)) == samples
    assert list(scenes.read(Path(), options(), seed=1)) != samples


def test_number_of_captions_leaves_pictures_alone(samples):
    others = scenes.read(Path(), options(raw=0, short=5), seed=0)
    assert [sample.image for sample in others] == [sample.image for sample in samples]


def test_splits_share_no_scene(samples):
    others = list(scenes.read(Path(), options(split="val"), seed=0))
    for field in ("key", "image"):
        assert not {getattr(s, field) for s in samples} & {getattr(s, field) for s in others}
    assert not {s.captions["long"][0] for s in samples} & {s.captions["long"][0] for s in others}


def test_samples_keep_the_contract(samples):
    assert len({sample.key for sample in samples}) == len(samples) == scenes.size(options())
    for sample in samples:
        assert not set("./") & set(sample.key)
        assert Image.open(io.BytesIO(sample.image)).size == (64, 64)
        assert {kind: len(texts) for kind, texts in sample.captions.items()} == {
            "raw": 1,
            "short": 1,
            "long": 1,
        }


@pytest.mark.parametrize("grammars", ["train", "held-out"])
def test_long_caption_names_every_facet(grammars):
    rng = Random(0)
    for scene in points():
        text = scenes._long(scene, grammars, rng).lower()
        assert 40 <= len(text.split()) <= 75
        for facet, section in FACETS.items():
            words = scenes.WORDS[section][getattr(scene, facet)]["words"]
            assert any(word in text for word in words), (facet, text)
        assert any(word in text for word in scenes.WORDS["relations"][scene.relation])
        assert any(word in text for word in scenes.WORDS["categories"][scenes.CATEGORY[scene.noun]])
        assert any(word in text for word in scenes.WORDS["tints"][scene.minor_tint]["words"])
        assert any(word in text for word in [scene.action] if word) or scene.action is None
        assert scene.noun in text
        assert scene.minor in text


def test_grammars_have_enough_forms_and_share_no_sentence():
    train, held_out = (
        {sentence for form in scenes.WORDS["long"][grammars] for sentence in form}
        for grammars in ("train", "held-out")
    )
    assert len(scenes.WORDS["long"]["train"]) >= 6
    assert len(scenes.WORDS["long"]["held-out"]) >= 2
    assert not train & held_out


def test_every_noun_has_its_artwork_in_every_tint():
    emojis = list(scenes.OBJECTS.values()) + [
        e for people in scenes.PEOPLE.values() for e in people.values()
    ]
    assert len(emojis) == len(set(emojis)) > 130
    for emoji in emojis:
        red, blue = (scenes._artwork(emoji, tint) for tint in ("red", "blue"))
        assert min(red.size) > 8
        assert red.tobytes() != blue.tobytes()


@pytest.mark.parametrize("relation", scenes.LABELS["relation"])
def test_objects_lie_apart_inside_the_frame_and_as_told(relation):
    rng = Random(0)
    for _ in range(200):
        main, minor = ((rng.randint(9, most), rng.randint(9, most)) for most in (40, 21))
        (x, y), (u, v) = scenes._corners(main, minor, relation, rng)
        for corner, box in (((x, y), main), ((u, v), minor)):
            assert all(at >= 1 and at + side <= 63 for at, side in zip(corner, box, strict=True))
        assert {
            "left of": u + minor[0] <= x,
            "right of": x + main[0] <= u,
            "above": v + minor[1] <= y,
            "below": y + main[1] <= v,
        }[relation]


@pytest.mark.parametrize("facet", scenes.LABELS)
def test_classes_are_balanced_and_labels_are_what_is_shown(facet):
    labels = list(scenes.classes(options(classify=facet)))
    found = points(2 * len(labels), classify=facet)
    assert Counter(getattr(scene, facet) for scene in found) == dict.fromkeys(labels, 2)
    for scene in found:
        assert scene.weather == "clear" or scene.place in scenes.OUTDOORS


def test_class_texts_are_filled_and_distinct():
    for facet in scenes.LABELS:
        texts = [tuple(texts) for texts in scenes.classes(options(classify=facet)).values()]
        assert len(set(texts)) == len(texts)
        assert not any("{" in text for group in texts for text in group)
    assert scenes.classes(options()) == {}
    assert scenes.classes(options(classify="noun"))["apple"][0] == "a picture of an apple."


def test_members_come_from_their_category():
    assert {scenes.CATEGORY[scene.noun] for scene in points(members="food")} == {"food"}
    assert set(scenes.classes(options(classify="noun", members="food"))) == set(
        scenes.MEMBERS["food"]
    )


def test_people_and_only_people_act():
    found = points(1000, people=0.7)
    assert all(
        (scene.action is not None) == (scenes.CATEGORY[scene.noun] == "person") for scene in found
    )
    assert 0.65 < sum(scene.action is not None for scene in found) / 1000 < 0.75


def test_hard_groups_share_main_object_and_place_and_nothing_else_surely():
    found = iter(points(200, hard_groups=4))
    while group := list(islice(found, 4)):
        assert len({(scene.noun, scene.place) for scene in group}) == 1
        assert len({scene.tint for scene in group}) == 4
        assert len({astuple(scene) for scene in group}) == 4


def test_a_few_images_have_one_more_short_caption():
    made = [
        scenes.describe(scene, options(short=5, extra_short=0.1), Random(i))["short"]
        for i, scene in enumerate(points())
    ]
    assert {len(texts) for texts in made} == {5, 6}
    assert 5 < sum(len(texts) == 6 for texts in made) < 40
    assert all(len(set(texts)) == len(texts) for texts in made)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"members": "fod"}, "unknown category 'fod'; known are animal, food"),
        ({"classify": "color"}, "classify"),
        ({"tints": 8}, "tints"),
        ({"split": "a.b"}, "split"),
        ({"classify": "tint", "hard_groups": 4}, "excludes classify"),
        ({"classify": "action", "members": "food"}, "'food' have no actions"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        options(**wrong)


def test_every_facet_changes_the_picture():
    scene = points(1)[0]
    # An object from outdoors that stands still, so that every facet may change alone.
    base = asdict(scene) | {
        "noun": "apple",
        "minor": "dog",
        "action": None,
        "place": "beach",
        "weather": "clear",
    }
    changes = {"noun": "pear", "minor": "cat", "place": "desert", "weather": "fog"} | {
        facet: next(
            name for name in scenes.LABELS[facet.removeprefix("minor_")] if name != base[facet]
        )
        for facet in ("tint", "minor_tint", "light", "relation")
    }
    pictures = {
        scenes.draw(scenes.Scene(**base | {facet: name}), Random(0))
        for facet, name in changes.items()
    }
    assert len(pictures | {scenes.draw(scenes.Scene(**base), Random(0))}) == len(changes) + 1
