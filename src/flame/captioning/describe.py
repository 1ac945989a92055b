"""Captions of images by a multimodal LLM, what is wrong with them, and captions of others."""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from flame.captioning.engines import Engine, Reply, Request
from flame.runtime.checksums import utf8
from flame.study.schema.data import Sampling, ServerCaptioner, TransformersCaptioner, VllmCaptioner

log = logging.getLogger(__name__)

Captioner = VllmCaptioner | ServerCaptioner | TransformersCaptioner

NGRAM = 4
MOST_REPEATED = 0.25  # share of n-grams; of 110 words of prose under 0.1
LETTERS = 0.5  # least share of what is no space
LONG_WORD = 25  # mean letters of a word from which a text is one without spaces
BLOCK = 1 << 20  # characters of a JSON file read at a time
LARGEST = 16 * BLOCK  # characters of an object in it
DEAD = 16  # requests that all fail, from which it is not the images that are at fault

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


class Row(NamedTuple):
    """A caption and what happened to it; without a text there is none.

    Flags, joined by commas: what was wrong with the first try (and the second), then `retried`,
    and `fallback` where the raw caption took its place or `dropped` where there was no raw one;
    `broken` alone for an image that cannot be read.
    """

    key: str
    kind: str
    text: str | None
    flags: str


def describe(
    engine: Engine,
    images: Mapping[str, Image.Image],
    captioner: Captioner,
    raw: Mapping[str, str],
) -> list[Row]:
    """Captions of every kind for some images, each tried at most twice.

    Args:
        engine: the captioner's.
        images: key -> upright RGB image.
        captioner: what to ask, and how to draw.
        raw: key -> raw caption, which stands in for one that stays bad.

    Returns:
        One row for each image and kind, the kinds of an image side by side.

    Raises:
        ValueError: the engine answers nothing at all.
    """
    wanted = [(key, kind) for key in images for kind in captioner.prompts]
    first = _ask(engine, images, wanted, captioner, captioner.sampling, "first")
    errors = [reply.text for reply in first.values() if reply.finish == "error"]
    if errors:
        log.warning("%d of %d requests failed, such as: %s", len(errors), len(first), errors[0])
    if len(errors) == len(first) >= DEAD:
        raise ValueError(f"none of {len(first)} requests was answered; the last: {errors[-1]}")
    wrong = {pair: faults(reply.text, reply.finish) for pair, reply in first.items()}
    # An error is no matter of drawing: the engine has tried it as often as it may.
    again = [pair for pair in wanted if wrong[pair] and "error" not in wrong[pair]]
    second = _ask(engine, images, again, captioner, captioner.retry, "second")
    rows = []
    for pair in wanted:
        reply, left, flags = first[pair], wrong[pair], [*wrong[pair]]
        if pair in second:
            reply = second[pair]
            left = faults(reply.text, reply.finish)
            flags += [*left, "retried"]
        text: str | None = reply.text.strip()
        if left:
            text, how = stand_in(raw.get(pair[0]))
            flags.append(how)
        rows.append(Row(*pair, text, ",".join(dict.fromkeys(flags))))
    return rows


def stand_in(raw: str | None) -> tuple[str | None, str]:
    """What takes the place of a bad caption, and the flag that says so."""
    return (raw, "fallback") if raw else (None, "dropped")


def _ask(
    engine: Engine,
    images: Mapping[str, Image.Image],
    pairs: Sequence[tuple[str, str]],
    captioner: Captioner,
    sampling: Sampling,
    attempt: str,
) -> dict[tuple[str, str], Reply]:
    """Replies to some (key, kind), whose seeds depend on nothing but these and the attempt."""
    requests = []
    for key, kind in pairs:
        purpose = repr((captioner.seed, attempt, key, kind)).encode()
        seed = int.from_bytes(hashlib.sha256(purpose).digest()[:4], "big") >> 1
        prompt, limit = captioner.prompts[kind], captioner.max_tokens[kind]
        requests.append(Request(images[key], prompt, sampling, limit, seed))
    replies = engine.describe(requests) if requests else []
    return dict(zip(pairs, replies, strict=True))


def faults(text: str, finish: Literal["stop", "length", "error"]) -> tuple[str, ...]:
    """What is wrong with a caption.

    Args:
        text: as the model gave it.
        finish: how the model ended.

    Returns:
        Of `error`, `empty`, `cut`, `loop`, `refusal`, `leaked`, `garbled` those that hold; nothing
        of a good caption.
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
    """Share of a text's n-grams of words that were there before, from 0 to under 1.

    Prose of caption length has next to none; `a red apple, a red apple, a red apple` has a half.
    In a text without spaces, such as a Chinese one, every letter is a word.
    """
    words = re.findall(r"\w+", text.lower())
    if sum(map(len, words)) > LONG_WORD * len(words):
        words = [*"".join(words)]
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _garbled(text: str) -> bool:
    """Bytes that are no language: broken, unassigned or control characters, or hardly a letter."""
    visible = [letter for letter in text if not letter.isspace()]
    letters = 0
    for letter in visible:
        category = unicodedata.category(letter)
        if letter == "\N{REPLACEMENT CHARACTER}" or category in ("Cc", "Cn", "Co", "Cs"):
            return True
        letters += category[0] in "LM"
    return letters < LETTERS * len(visible)


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON list or of JSON lines, without ever holding the whole file.

    Raises:
        ValueError: the file is neither, breaks off, or is not UTF-8.
    """
    decode = json.JSONDecoder().raw_decode
    with utf8(path) as file:
        buffer, place, more = file.read(BLOCK), 0, True
        is_list = buffer.lstrip().startswith("[")
        while True:
            place = _next_object(buffer, place)
            try:
                found, place = decode(buffer, place)
            except json.JSONDecodeError as error:
                block = file.read(BLOCK) if more and len(buffer) - place < LARGEST else ""
                more = bool(block)
                if not more and (place < len(buffer) or is_list != buffer.rstrip().endswith("]")):
                    raise ValueError(f"{path} is no whole JSON list or lines: {error}") from error
                if not more:
                    return
                # What was read already goes, but for the last letters: a list ends with them.
                kept = min(place, max(0, len(buffer) - 8))
                buffer, place = buffer[kept:] + block, place - kept
                continue
            if not isinstance(found, dict):
                raise ValueError(f"{path}: {json.dumps(found)[:80]} is no object")
            yield found


def _next_object(buffer: str, place: int) -> int:
    """Place after the spaces, commas and brackets between two objects."""
    match = re.compile(r"[\s,\[\]]*").match(buffer, place)
    assert match is not None
    return match.end()
