"""What every data set promises, and that scenes show and tell the same facets."""

import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from pydantic import ValidationError

from flame.data import datasets
from flame.data.datasets import scenes
from flame.data.datasets.scenes import captions, compose, languages, picture, sampling, words

FACETS = {
    "tint": "tints",
    "place": "places",
    "light": "lights",
    "weather": "weathers",
    "mood": "moods",
}
BARE = {"raw": 0, "short": 0, "long": 0}
EDITS = sorted(set(words.WORDS["compose"]) - {"winoground"})
# sha256 of pixels and of texts.
DIGESTS = {
    "train": "f848bf9092e77947",
    "people": "e44c55e0a25463b1",
    "hard": "cef173665694841e",
    "animals": "22d8167047614fed",
    "moods": "e9f2e77b632d779d",
}


def options(**changes):
    return scenes.Options(
        **{"split": "train", "images": 40, "raw": 1, "short": 1, "long": 1} | changes
    )


def points(count=200, **changes):
    """Scenes without their pictures."""
    return list(sampling.scenes(options(images=count, **changes), Random(0)))


@pytest.fixture(scope="module")
def samples():
    return list(scenes.read(Path(), options(), seed=0))


def test_unknown_data_set_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'scene' .*known: .*scenes"):
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
        text = captions._long(scene, grammars, rng).lower()
        assert 40 <= len(text.split()) <= 85
        for facet, section in FACETS.items():
            synonyms = words.WORDS[section][getattr(scene, facet)]["words"]
            assert any(word in text for word in synonyms), (facet, text)
        assert any(word in text for word in words.WORDS["relations"][scene.relation])
        assert any(word in text for word in words.WORDS["categories"][words.CATEGORY[scene.noun]])
        assert any(word in text for word in words.WORDS["tints"][scene.minor_tint]["words"])
        assert any(word in text for word in [scene.action] if word) or scene.action is None
        assert scene.noun in text
        assert scene.minor in text


def test_grammars_have_enough_forms_and_share_no_sentence():
    train, held_out = (
        {sentence for form in words.WORDS["long"][grammars] for sentence in form}
        for grammars in ("train", "held-out")
    )
    assert len(words.WORDS["long"]["train"]) >= 6
    assert len(words.WORDS["long"]["held-out"]) >= 2
    assert not train & held_out


def test_every_noun_has_its_artwork_in_every_tint():
    emojis = list(words.OBJECTS.values()) + [
        e for people in words.PEOPLE.values() for e in people.values()
    ]
    assert len(emojis) == len(set(emojis)) > 130
    for emoji in emojis:
        red, blue = (picture._artwork(emoji, tint) for tint in ("red", "blue"))
        assert min(red.size) > 8
        assert red.tobytes() != blue.tobytes()


@pytest.mark.parametrize("relation", words.LABELS["relation"])
def test_objects_lie_apart_inside_the_frame_and_as_told(relation):
    rng = Random(0)
    for _ in range(200):
        main, minor = ((rng.randint(9, most), rng.randint(9, most)) for most in (40, 21))
        (x, y), (u, v) = picture._corners(main, minor, relation, rng)
        for corner, box in (((x, y), main), ((u, v), minor)):
            assert all(at >= 1 and at + side <= 63 for at, side in zip(corner, box, strict=True))
        assert {
            "left of": u + minor[0] <= x,
            "right of": x + main[0] <= u,
            "above": v + minor[1] <= y,
            "below": y + main[1] <= v,
        }[relation]


@pytest.mark.parametrize("facet", words.LABELS)
def test_classes_are_balanced_and_labels_are_what_is_shown(facet):
    labels = list(scenes.classes(Path(), options(classify=facet)))
    found = points(2 * len(labels), classify=facet)
    assert Counter(getattr(scene, facet) for scene in found) == dict.fromkeys(labels, 2)
    for scene in found:
        assert scene.weather == "clear" or scene.place in words.OUTDOORS


def test_class_texts_are_filled_and_distinct():
    for facet in words.LABELS:
        texts = [tuple(texts) for texts in scenes.classes(Path(), options(classify=facet)).values()]
        assert len(set(texts)) == len(texts)
        assert not any("{" in text for group in texts for text in group)
    assert scenes.classes(Path(), options()) == {}
    assert scenes.classes(Path(), options(classify="noun"))["apple"][0] == "a picture of an apple."


def test_members_come_from_their_category():
    assert {words.CATEGORY[scene.noun] for scene in points(members="food")} == {"food"}
    assert set(scenes.classes(Path(), options(classify="noun", members="food"))) == set(
        words.MEMBERS["food"]
    )


def test_people_and_only_people_act():
    found = points(1000, people=0.7)
    assert all(
        (scene.action is not None) == (words.CATEGORY[scene.noun] == "person") for scene in found
    )
    assert 0.65 < sum(scene.action is not None for scene in found) / 1000 < 0.75


@pytest.mark.parametrize(
    "differ",
    [("minor",), ("relation",), ("minor_tint",), ("minor", "minor_tint", "relation", "weather")],
)
def test_scenes_of_a_group_share_all_but_what_they_differ_in(differ):
    found = iter(points(200, differ=differ))
    others = set()
    while group := list(islice(found, 4)):
        assert len({getattr(scene, differ[0]) for scene in group}) == 4
        for facet in asdict(group[0]):
            values = {getattr(scene, facet) for scene in group}
            assert facet in differ or len(values) == 1
            others |= {facet} if len(values) > 1 else set()
        assert all(scene.minor in words.MINORS and scene.minor != scene.noun for scene in group)
    assert others == set(differ)


def test_keys_name_the_groups():
    made = scenes.read(Path(), options(images=8, differ=["minor"]), seed=0)
    assert [sample.key for sample in made][2:6] == [
        *("train-000000-2", "train-000000-3", "train-000001-0", "train-000001-1")
    ]


def test_drawings_of_a_scene_differ_in_pixels_only(samples):
    drawn = list(scenes.read(Path(), options(drawings=3), seed=0))
    assert [sample.captions for sample in drawn] == [sample.captions for sample in samples]
    assert {len({sample.image, *sample.more}) for sample in drawn} == {3}


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
        ({"members": "fod"}, "unknown category 'fod' .*known: animal, food"),
        ({"classify": "color"}, "classify"),
        ({"tints": 8}, "tints"),
        ({"split": "a.b"}, "split"),
        ({"classify": "tint", "differ": ["minor"]}, "excludes classify"),
        ({"differ": ["place"]}, "differ"),
        ({"differ": ["relation"], "group": 5}, "differ in 'relation' in 4 ways only"),
        ({"differ": ["minor"], "images": 42}, "images 42 are not whole groups of 4"),
        ({"classify": "action", "members": "food"}, "'food' have no actions"),
        ({"language": "xx"}, "language"),
        ({"language": "ru", "long": 1}, "raw is English only, not 'ru'"),
        ({"language": "ru", "raw": 0, "long": 1}, "long is English only, not 'ru'"),
        (BARE | {"language": "ja", "compose": "add_obj"}, "compose is English only, not 'ja'"),
        (BARE | {"language": "ja", "classify": "tint"}, "classify 'tint' is English only"),
        (BARE | {"language": "ja", "short": 3}, "short 3 .* the 2 short forms of language 'ja'"),
        (BARE | {"language": "ja", "short": 2, "extra_short": 0.1}, "extra_short 0.1 needs"),
        ({"compose": "swap"}, "compose"),
        ({"compose": "swap_obj"}, "compose 'swap_obj' excludes raw 1"),
        (BARE | {"compose": "add_att", "long": 2}, "excludes long 2"),
        (BARE | {"compose": "add_att", "classify": "noun"}, "excludes classify 'noun'"),
        (BARE | {"compose": "add_att", "differ": ["minor"]}, "excludes differ"),
        (BARE | {"compose": "add_att", "people": 0.5}, "excludes people 0.5"),
        (BARE | {"compose": "add_att", "members": "person"}, "shows objects, not members 'person'"),
        (BARE | {"compose": "winoground", "images": 5}, "images 5 is odd"),
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
            name for name in words.LABELS[facet.removeprefix("minor_")] if name != base[facet]
        )
        for facet in ("tint", "minor_tint", "light", "relation")
    }
    pictures = {
        scenes.draw(scenes.Scene(**base | {facet: name}), Random(0))
        for facet, name in changes.items()
    }
    assert len(pictures | {scenes.draw(scenes.Scene(**base), Random(0))}) == len(changes) + 1


@pytest.mark.parametrize(
    "asked",
    [
        {"split": "train", "images": 20, "raw": 2, "short": 2, "extra_short": 0.3, "long": 2},
        {"split": "people", "images": 20, "short": 5, "people": 0.8},
        {"split": "hard", "images": 20, "long": 1, "grammars": "held-out", "differ": ["minor"]},
        {"split": "animals", "images": 20, "classify": "noun", "members": "animal"},
        {"split": "moods", "images": 20, "classify": "mood"},
    ],
    ids=lambda asked: asked["split"],
)
def test_sets_are_what_they_were(asked):
    made = scenes.Options(**asked)
    digest = hashlib.sha256(json.dumps(scenes.classes(Path(), made)).encode())
    for sample in scenes.read(Path(), made, 0):
        digest.update(Image.open(io.BytesIO(sample.image)).tobytes())
        digest.update(json.dumps([sample.key, sample.captions, sample.label]).encode())
    assert digest.hexdigest()[:16] == DIGESTS[made.split]


def test_a_training_split_has_the_classes_of_its_test_split_in_equal_numbers():
    probe = {"classify": "noun", "members": "animal"}
    train, test = (
        scenes.Options(split=split, images=images, **probe)
        for split, images in (("animals-train", 576), ("animals", 288))
    )
    assert scenes.classes(Path(), train) == scenes.classes(Path(), test)
    for made, times in ((train, 16), (test, 8)):
        found = Counter(scene.noun for scene in sampling.scenes(made, Random(0)))
        assert found == dict.fromkeys(words.MEMBERS["animal"], times)
    images = [
        {sample.image for sample in islice(scenes.read(Path(), made, 0), 72)}
        for made in (train, test)
    ]
    assert [len(some) for some in images] == [72, 72]
    assert not images[0] & images[1]


# Languages


@pytest.mark.parametrize("language", languages.LEXICON)
def test_a_language_changes_texts_only(language):
    for asked in ({"short": 1, "people": 0.5}, {"classify": "noun"}):
        told, english = (
            list(scenes.read(Path(), options(**BARE | asked, images=8, language=code), 0))
            for code in (language, "en")
        )
        for field in ("key", "image", "label"):
            assert [getattr(s, field) for s in told] == [getattr(s, field) for s in english]
        if "short" in asked:
            assert all(s.captions != e.captions for s, e in zip(told, english, strict=True))
            assert all(len(s.captions["short"]) == 1 for s in told)


@pytest.mark.parametrize("language", languages.LEXICON)
def test_short_captions_tell_both_objects_and_the_place_in_every_language(language):
    lexicon = languages.LEXICON[language]
    for scene in points(people=0.3):
        texts = languages.short(scene, language, 2, Random(0))
        assert len(set(texts)) == 2
        for text in map(str.casefold, texts):
            assert "{" not in text
            told = [
                languages.name(scene.noun, language, scene.action),
                languages.name(scene.minor, language),
                lexicon["tints"][scene.tint],
                lexicon["tints"][scene.minor_tint],
                lexicon["places"][scene.place],
            ]
            assert all(word.casefold() in text for word in told), (text, told)
        where, when = lexicon["relations"][scene.relation], lexicon["lights"][scene.light]
        assert sum(where.casefold() in text.casefold() for text in texts) >= 1
        assert sum(when.casefold() in text.casefold() for text in texts) >= 1


@pytest.mark.parametrize("language", languages.LEXICON)
def test_a_lexicon_knows_every_facet_and_tells_them_apart(language):
    lexicon = languages.LEXICON[language]
    for facet in ("tint", "place", "relation", "light"):
        assert list(lexicon[f"{facet}s"]) == words.LABELS[facet]
        assert len(set(lexicon[f"{facet}s"].values())) == len(words.LABELS[facet])
    people = {f"{noun} {action}" for action in words.PEOPLE for noun in words.MEMBERS["person"]}
    assert set(lexicon["names"]) <= set(words.CATEGORY) | people


@pytest.mark.parametrize("language", ["en", *languages.LEXICON])
def test_class_names_are_distinct_in_every_language(language):
    classes = scenes.classes(Path(), options(**BARE | {"classify": "noun", "language": language}))
    assert list(classes) == words.LABELS["noun"]
    for texts in zip(*classes.values(), strict=True):
        # Not even letter case, width or spaces tell two of them apart.
        plain = [unicodedata.normalize("NFKC", text).casefold().replace(" ", "") for text in texts]
        assert [name for name, count in Counter(plain).items() if count > 1] == []


@pytest.mark.parametrize("language", languages.LEXICON)
def test_people_are_told_by_what_they_do(language):
    names = [
        languages.name(noun, language, action)
        for action in words.PEOPLE
        for noun in ("woman", "man")
    ]
    assert len(set(names)) == 2 * len(words.PEOPLE)
    assert not {languages.name(noun, language) for noun in ("woman", "man")} & set(names)


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("de", ["Apfel", "ein Bild: Apfel"]),
        ("fr", ["pomme", "une image : pomme"]),
        ("ja", ["リンゴ", "リンゴの絵"]),
        ("zh", ["苹果", "一张苹果的图片"]),
        ("ar", ["تفاحة", "صورة تفاحة"]),
    ],
)
def test_the_apple_has_no_colour_in_its_name(language, texts):
    # The package calls its emoji a red apple, which a blue one is not.
    made = options(**BARE | {"classify": "noun", "language": language})
    assert scenes.classes(Path(), made)["apple"] == texts


def test_a_caption_in_another_language():
    scene = scenes.Scene(
        *("dog", "red", "cat", "blue", "beach", "day", "clear", "left of"), action=None
    )
    runner = scenes.Scene(**asdict(scene) | {"noun": "woman", "action": "running"})
    told = {
        code: sorted(languages.short(point, code, 2, Random(0)))
        for code, point in (("es", scene), ("de", runner), ("ru", scene), ("ko", runner))
    }
    assert told == {
        "es": [
            "Perro de color rojo con gato de color azul en la playa, de día.",
            "Perro de color rojo en la playa; a la izquierda, gato de color azul.",
        ],
        "de": [
            "Laufende Frau in Rot am Strand am Tag, dazu Katze in Blau.",
            "Laufende Frau in Rot am Strand; links davon: Katze in Blau.",
        ],
        "ru": [
            "Днём на пляже: собака красного цвета, рядом — кошка синего цвета.",
            "Собака красного цвета на пляже, слева — кошка синего цвета.",
        ],
        "ko": [
            "낮, 해변에 있는 빨간색 옷을 입은 뛰는 여자, 그리고 파란색 고양이.",
            "해변에 있는 빨간색 옷을 입은 뛰는 여자, 왼쪽에 파란색 고양이.",
        ],
    }


# Compositionality


def alternatives(synonyms):
    return "|".join(sorted(synonyms, key=len, reverse=True))


def plain_names(section):
    """Synonym -> plain name."""
    entries = words.WORDS[section].items()
    return {
        word: name
        for name, entry in entries
        for word in (entry if isinstance(entry, list) else entry["words"])
    }


TINTS, RELATIONS, PLACES = (plain_names(section) for section in ("tints", "relations", "places"))
MENTION = (
    r"(?:an?|the) (?:(small|large) )?"
    rf"(?:({alternatives(TINTS)}) )?({alternatives(words.OBJECTS)})\b"
)
RELATED = re.compile(rf"{MENTION} (?:is )?({alternatives(RELATIONS)}) {MENTION}")


def is_true(caption, scene):
    """Whether a picture of the scene shows all that the caption claims, as its text reads."""
    text = caption.lower().removesuffix(".")
    main, minor = (scene.noun, scene.tint, "large"), (scene.minor, scene.minor_tint, "small")
    mentions = re.findall(MENTION, text)
    assert mentions, caption
    shown = [
        any(
            noun == said_noun and said_tint in (None, tint) and said_size in ("", size)
            for noun, tint, size in (main, minor)
        )
        for said_size, said_tint, said_noun in (
            (size, TINTS.get(tint), noun) for size, tint, noun in mentions
        )
    ]
    places = [place for word, place in PLACES.items() if word in text]
    opposite = {"left of": "right of", "above": "below"}
    opposite |= {value: key for key, value in opposite.items()}
    first = None
    if text.endswith(" it"):
        relation = next(
            RELATIONS[r] for r in sorted(RELATIONS, key=len)[::-1] if f" {r} it" in text
        )
        first = mentions[1][2]
    elif found := RELATED.search(text):
        relation, first = RELATIONS[found[4]], found[3]
    is_related = first is None or (
        scene.relation == (relation if first == scene.minor else opposite[relation])
    )
    return all(shown) and is_related and all(place == scene.place for place in places)


def composed(edit, images=200, **changes):
    made = options(**BARE | {"compose": edit, "images": images} | changes)
    return list(compose.examples(made, Random(0), Random(1)))


def test_truth_is_read_from_the_caption():
    scene = scenes.Scene(
        *("dog", "red", "cat", "blue", "beach", "day", "clear", "left of"), action=None
    )
    for text in (
        "A dog.",
        "A scarlet dog and a small blue cat at the seaside.",
        "A red dog with a small blue cat to the left of it.",
        "A small blue cat left of a red dog.",
        "The red dog is right of the blue cat on the beach.",
    ):
        assert is_true(text, scene), text
    for text in (
        "A blue dog.",
        "A red dog and a small blue cat in the desert.",
        "A red dog, a key and a small blue cat.",
        "A red cat and a small blue dog.",
        "A red dog with a small blue cat above it.",
        "A small blue cat right of a red dog.",
        "The red dog is left of the blue cat on the beach.",
    ):
        assert not is_true(text, scene), text


@pytest.mark.parametrize("edit", EDITS)
def test_one_caption_is_true_and_the_edited_one_is_false(edit):
    for key, scene, captions_ in composed(edit):
        assert set(captions_) == {"positive", "negative"}, key
        (positive,), (negative,) = captions_["positive"], captions_["negative"]
        assert is_true(positive, scene), (positive, scene)
        assert not is_true(negative, scene), (negative, scene)


@pytest.mark.parametrize(
    ("edit", "gone", "come"),
    [
        ("add_att", 0, 1),  # a tint
        ("add_obj", 0, 1),  # an object
        ("replace_att", 1, 1),
        ("replace_obj", 1, 1),
        ("replace_rel", 1, 1),
        ("swap_att", 0, 0),
        ("swap_obj", 0, 0),
    ],
)
def test_edits_are_minimal(edit, gone, come):
    known = alternatives([*TINTS, *words.OBJECTS, *RELATIONS, *PLACES])
    for _, _, told in composed(edit):
        true, false = (
            Counter(re.findall(rf"\b(?:{known})\b", told[kind][0].lower()))
            for kind in ("positive", "negative")
        )
        assert (sum((true - false).values()), sum((false - true).values())) == (gone, come), told


def test_pairs_of_winoground_have_the_same_words_and_change_captions():
    made = composed("winoground")
    assert [key for key, _, _ in made[:3]] == [
        f"train-00000{tail}" for tail in ("0-0", "0-1", "1-0")
    ]
    changed = Counter()
    for (_, one, told), (_, other, retold) in zip(made[::2], made[1::2], strict=True):
        assert set(told) == set(retold) == {"positive"}
        (first,), (second,) = told["positive"], retold["positive"]
        truth = [[is_true(text, scene) for scene in (one, other)] for text in (first, second)]
        assert truth == [[True, False], [False, True]], (first, second, one)
        assert first != second
        assert Counter(re.findall(r"\w+", first.lower())) == Counter(
            re.findall(r"\w+", second.lower())
        )
        changed[tuple(f for f in asdict(one) if asdict(one)[f] != asdict(other)[f])] += 1
    assert changed == {("relation",): 50, ("tint", "minor_tint"): 50}


@pytest.mark.parametrize("edit", ["winoground", "replace_obj"])
def test_what_the_backdrop_holds_is_no_object_of_an_edit(edit):
    for _, scene, told in composed(edit, 400):
        held = words.WORDS["places"][scene.place].get("holds", [])
        nouns = [
            noun for text in told.values() for *_, noun in re.findall(MENTION, text[0].lower())
        ]
        assert not {scene.noun, scene.minor, *nouns} & set(held)
        assert scene.action is None
        for group in words.WORDS["alike"]:
            assert len({scene.noun, scene.minor, *nouns} & set(group)) <= 1


def test_nouns_of_the_words_on_compositionality_exist():
    held = {noun for place in words.WORDS["places"].values() for noun in place.get("holds", [])}
    alike = {noun for group in words.WORDS["alike"] for noun in group}
    assert held | alike <= set(words.OBJECTS)


def test_composed_samples_are_drawn_as_told():
    made = options(**BARE | {"compose": "winoground", "images": 6, "members": "food"})
    samples = list(scenes.read(Path(), made, 0))
    assert len({sample.image for sample in samples}) == len(samples) == scenes.size(made) == 6
    assert {sample.label for sample in samples} == {None}
    assert list(scenes.read(Path(), made, 0)) == samples
    told = compose.examples(made, Random("0/train"), Random("0/train/words"))
    for sample, (key, scene, texts) in zip(samples, told, strict=True):
        assert (sample.key, sample.captions) == (key, texts)
        assert words.CATEGORY[scene.noun] == "food"
