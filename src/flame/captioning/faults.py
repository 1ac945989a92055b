"""Heuristics that detect a bad caption: refused, cut, looping, leaked tokens, garbled."""

import re
import unicodedata
from typing import Literal

NGRAM = 4
MOST_REPEATED = 0.25  # share of n-grams; under 0.1 in prose of 110 words
LETTERS = 0.5  # smallest share of letters among visible characters
LONG_WORD = 25  # mean letters per word above which a text is taken to have no spaces

REFUSAL = re.compile(
    r"\W*(?:"
    r"(?:i'?m|i am|we are|we're)\s+(?:(?:really|very|so)\s+)?"
    r"(?:sorry|unable|not able|afraid|an ai\b|a (?:large )?language model)"
    r"|sorry\b|unfortunately,? (?:i|we)\b|i apologi[sz]e|my apologies|as an ai\b"
    r"|i (?:cannot|can'?t|could not|couldn't|do not|don't|am not)\b"
    r"|(?:please|could you|can you) (?:please )?(?:provide|upload|share|attach)\b"
    r"|(?:no image|there is no image|there's no image)\b"
    r"|对不起|抱歉|很抱歉|作为一个人工智能"
    r")",
    re.IGNORECASE,
)
LEAKED = re.compile(
    r"<\|[^|<>\n]{1,40}\|>"
    r"|</?(?:s|bos|eos|pad|unk|mask|image|img|video|think|tool_call|box|ref|quad|slice|image_id)>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
    r"|(?m:^\s*(?:USER|ASSISTANT|SYSTEM)\s*:)|(?m:^\s*#+\s*(?:Human|Assistant|Instruction)\b)"
)


def faults(text: str, finish: Literal["stop", "length", "error"]) -> tuple[str, ...]:
    """Faults of a caption, in a fixed order; empty for a good one.

    Args:
        text: the caption as generated.
        finish: why generation ended.

    Returns:
        Any of `error`, `empty`, `cut`, `loop`, `refusal`, `leaked`, `garbled`.
    """
    if finish == "error":
        return ("error",)
    if not text.strip():
        return ("empty",)
    found = {
        "cut": finish == "length",
        "loop": repeated(text) > MOST_REPEATED,
        "refusal": REFUSAL.match(text) is not None,
        "leaked": LEAKED.search(text) is not None,
        "garbled": _garbled(text),
    }
    return tuple(name for name, holds in found.items() if holds)


def repeated(text: str, n: int = NGRAM) -> float:
    """Share of a text's word n-grams that occurred before, in [0, 1).

    Close to 0 for prose of caption length, 0.5 for `a red apple, a red apple, a red apple`. In a
    text without spaces, such as Chinese, every character counts as a word.
    """
    words = re.findall(r"\w+", text.lower())
    if sum(map(len, words)) > LONG_WORD * len(words):
        words = [*"".join(words)]
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _garbled(text: str) -> bool:
    """Whether a text has replacement, control or unassigned characters, or hardly any letters."""
    visible = [letter for letter in text if not letter.isspace()]
    letters = 0
    for letter in visible:
        category = unicodedata.category(letter)
        if letter == "\N{REPLACEMENT CHARACTER}" or category in ("Cc", "Cn", "Co", "Cs"):
            return True
        letters += category[0] in "LM"
    return letters < LETTERS * len(visible)
