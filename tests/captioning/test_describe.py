"""Bad captions are retried once, then replaced by the raw caption."""

import asyncio
from dataclasses import replace

import pytest
from PIL import Image

from flame.captioning.describe import describe
from flame.captioning.engines import Reply
from flame.captioning.parts import Row
from flame.study.schema.data import ServerCaptioner, TransformersCaptioner

CAPTIONER = TransformersCaptioner(
    engine="transformers",
    id="none",
    prompts={"long": "What is it?", "short": "In short?"},
    max_tokens={"long": 50, "short": 20},
)
GOOD = "A red apple lies on a wooden table beside a blue cup, in front of a window."
LOOP = "a red apple, a red apple, a red apple"


class Scripted:
    """Stand-in for a multimodal LLM with scripted replies to each (image, question).

    The image is told by the red of its first pixel; what the script lacks is answered well.
    """

    def __init__(self, script=None):
        self.script = script or {}
        self.calls = []

    async def describe(self, requests):
        self.calls.append(list(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        question = (request.image.getpixel((0, 0))[0], request.prompt)
        left = self.script.get(question, [])
        found = left.pop(0) if left else Reply(GOOD, "stop")
        return replace(found)


def described(engine, images, captioner, raw):
    """Rows of the captions."""
    return asyncio.run(describe(engine, images, captioner, raw)).rows


def images(count):
    return {f"p{i}": Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(count)}


def test_kinds_of_an_image_stand_side_by_side_in_requests_and_rows():
    engine = Scripted()
    rows = described(engine, images(2), CAPTIONER, {})
    pairs = [("p0", "long"), ("p0", "short"), ("p1", "long"), ("p1", "short")]
    assert rows == [Row(*pair, GOOD, "") for pair in pairs]
    (asked,) = engine.calls
    assert [(r.image.getpixel((0, 0))[0], r.prompt, r.max_tokens) for r in asked] == [
        (0, "What is it?", 50),
        (0, "In short?", 20),
        (1, "What is it?", 50),
        (1, "In short?", 20),
    ]
    assert {r.sampling for r in asked} == {CAPTIONER.sampling}


def test_a_bad_caption_is_asked_for_once_more_in_another_way():
    engine = Scripted({(1, "In short?"): [Reply(LOOP, "length"), Reply(" Better so.\n", "stop")]})
    rows = described(engine, images(3), CAPTIONER, {"p1": "raw"})
    assert rows[3] == Row("p1", "short", "Better so.", "cut,loop,retried")
    assert all(row.flags == "" for row in rows if row != rows[3])
    first, second = engine.calls
    (again,) = second
    assert (again.image, again.prompt) == (first[3].image, first[3].prompt)
    assert again.max_tokens == 20
    assert again.sampling == CAPTIONER.retry
    assert again.seed != first[3].seed


def test_two_bad_captions_give_way_to_the_raw_one_or_to_none():
    bad = [Reply("", "stop"), Reply(GOOD, "length"), Reply(GOOD, "stop")]
    engine = Scripted({(i, "What is it?"): [*bad] for i in range(3)})
    rows = described(engine, images(3), CAPTIONER, {"p0": "raw 0", "p2": ""})
    assert rows[::2] == [
        Row("p0", "long", "raw 0", "empty,cut,retried,fallback"),
        Row("p1", "long", None, "empty,cut,retried,dropped"),
        Row("p2", "long", None, "empty,cut,retried,dropped"),
    ]
    assert [len(call) for call in engine.calls] == [6, 3]


def test_the_same_fault_twice_is_told_once():
    engine = Scripted({(0, "What is it?"): [Reply("", "stop"), Reply("", "stop")]})
    assert described(engine, images(1), CAPTIONER, {})[0].flags == "empty,retried,dropped"


def test_an_error_is_not_asked_for_again():
    engine = Scripted({(0, "What is it?"): [Reply("too large", "error")]})
    found = asyncio.run(describe(engine, images(1), CAPTIONER, {"p0": "raw"}))
    assert found.rows[0] == Row("p0", "long", "raw", "error,fallback")
    assert found.refused == {("p0", "long"): "too large"}
    assert len(engine.calls) == 1


def seeds(keys, **changes):
    """Seeds of the first requests of some keys, by key and question."""
    engine, own = Scripted(), images(9)
    captioner = CAPTIONER.model_copy(update=changes)
    described(engine, {key: own[key] for key in keys}, captioner, {})
    return {(r.image.getpixel((0, 0))[0], r.prompt): r.seed for r in engine.calls[0]}


def test_a_seed_depends_on_its_image_and_kind_alone():
    whole = seeds([f"p{i}" for i in range(9)])
    assert len(set(whole.values())) == 18
    assert all(0 <= seed < 2**31 for seed in whole.values())
    some = seeds(["p7", "p2"])
    assert some == {question: whole[question] for question in some}
    assert not set(seeds(["p7", "p2"], seed=1).values()) & set(some.values())


@pytest.mark.parametrize("seed_requests", [False, True])
def test_a_server_is_sent_seeds_if_the_study_says_so(seed_requests):
    captioner = ServerCaptioner(
        engine="server",
        url="http://127.0.0.1:1/v1",
        model="m",
        prompts=CAPTIONER.prompts,
        max_tokens=CAPTIONER.max_tokens,
        seed_requests=seed_requests,
    )
    engine = Scripted()
    described(engine, images(2), captioner, {})
    assert [r.seed is not None for r in engine.calls[0]] == [seed_requests] * 4
