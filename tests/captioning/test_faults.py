"""Faults of captions are found, and good captions have none."""

import pytest

from flame.captioning.faults import faults, repeated

GOOD = "A red apple lies on a wooden table beside a blue cup, in front of a window."
CHINESE = "一个红苹果放在木桌上。旁边有一只蓝色的杯子。窗外阳光明媚。"
LOOP = "a red apple, a red apple, a red apple"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        CHINESE,
        "Ein roter Apfel liegt auf dem Tisch; daneben steht eine Tasse.",
        "a dog",
        "A child who looks sorry holds a broken toy; I cannot be read on the sign behind.",
        "A poster says “Sorry, we are closed”. Unfortunately, its corner is torn.",
        "The image shows an assistant: a man in a white coat, at a user's desk.",
        "A very, very old man walks past a long, long wall.",
        "A shop sells 3 kg of apples for $4.50 & pears at <half> the price.",
        "No imagery of war is on the wall, but a map.",
        "I-beams of steel lie beside a road.",
        "A cat 🐈 sleeps on a sofa.",
    ],
)
def test_nothing_is_wrong_with_prose(text):
    assert faults(text, "stop") == ()


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("connection lost", "error", ("error",)),
        ("", "error", ("error",)),
        ("", "stop", ("empty",)),
        (" \n\t", "length", ("empty",)),
        (GOOD, "length", ("cut",)),
        (LOOP, "stop", ("loop",)),
        (LOOP, "length", ("cut", "loop")),
        ("红苹果和杯子" * 8, "stop", ("loop",)),
        ("I'm sorry. <|eot_id|>", "stop", ("refusal", "leaked")),
    ],
)
def test_what_is_wrong_with_a_caption_is_named(text, finish, expected):
    assert faults(text, finish) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I am really sorry, the picture does not load.",
        "Sorry, there is nothing that I can say about it.",
        "Unfortunately, I cannot see the picture.",
        "I apologize, but the picture is not clear.",
        "As an AI, I see no pictures.",
        "As an AI language model, I see no pictures.",
        '"I cannot describe people."',
        "I don't see a picture.",
        "I am unable to describe this.",
        "I'm a large language model and see nothing.",
        "Please provide the image that you mean.",
        "Could you please upload the image?",
        "No image was attached.",
        "There is no image here.",
        "对不起。我不能描述这张图片。",
        "很抱歉。我无法看到图片。",
        "抱歉。图片没有加载。",
        "作为一个人工智能。我看不到图片。",
    ],
)
def test_a_refusal_is_seen_in_many_words(text):
    assert faults(text, "stop") == ("refusal",)


@pytest.mark.parametrize(
    "token",
    [
        "<|eot_id|>",
        "<|im_start|>",
        "</s>",
        "<s>",
        "<image>",
        "<think>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "<</SYS>>",
        "\nASSISTANT:",
        "\n  USER :",
        "\n### Human",
    ],
)
def test_tokens_of_a_chat_in_a_caption_are_seen(token):
    assert faults(f"{GOOD} {token} It is day.", "stop") == ("leaked",)


@pytest.mark.parametrize(
    "text", ["A dog � in the grass", "A dog \x00 in the grass", "A dog \ue000", "12 34 :: // 56 !!"]
)
def test_what_is_no_language_is_garbled(text):
    assert faults(text, "stop") == ("garbled",)


def test_the_share_of_what_was_there_before_is_as_counted_by_hand():
    # 9 words, 6 runs of four: (a red apple a), (red apple a red), (apple a red apple), all twice.
    assert repeated(LOOP) == pytest.approx(3 / 6)
    assert repeated("one two three") == 0
    assert repeated("one two three four five") == 0
    assert repeated("One two, ONE TWO; one two", n=2) == pytest.approx(3 / 5)
    # Without spaces every letter is a word: 28 of them, 25 runs of which 7 differ.
    assert repeated("红苹果放在桌上" * 4) == pytest.approx(18 / 25)
    assert repeated("") == 0
