"""Few-shot classification: episodes, prompts, constrained answers, and a real LLM that answers."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flame.embedding import checkpoints
from flame.evaluation.fewshot import Episode, constrained, draw, pictures, say
from flame.evaluation.vocabulary import Speaker
from flame.study.schema.benchmarks import Trial

LABELS = [label for label in ("ape", "hot", "hot dog", "zebra") for _ in range(5)] + [None]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    """A random LLM over bytes whose head is tied to its token embeddings."""
    out = tmp_path_factory.mktemp("llm")
    checkpoints.random("gemma3_text", out)
    return out


@pytest.fixture(scope="module")
def speaker(llm) -> Speaker:
    speaker = Speaker(llm)
    speaker.model = speaker.model.float()
    return speaker


def generated(speaker, checkpoint, prompt: list[int], answers: dict[str, list[int]]) -> str:
    """Answer by `generate` of transformers, restricted to tokens of the answers."""
    causal = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    stop = len(speaker.head) - 1  # a token in none of the answers
    assert all(stop not in ids for ids in answers.values())

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        said = ids[len(prompt) :].tolist()
        ahead = [
            a[len(said)] for a in answers.values() if a[: len(said)] == said and len(a) > len(said)
        ]
        return ahead or [stop]

    out = causal.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=40,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    said = out[0, len(prompt) :].tolist()
    return next(name for name, ids in answers.items() if ids == said[: len(ids)])


@pytest.mark.parametrize(
    "names",
    [["hot", "hot dog", "hot tub"], ["horse", "hot", "hot dog", "ape", "app", "zebra"]],
)
def test_constrained_decoding_says_what_generate_says(speaker, llm, names):
    answers = {name: speaker.ids(f" {name}\n") for name in names}
    rng = random.Random(0)
    said = []
    for _ in range(16):
        prompt = speaker.start() + rng.choices(range(1, len(speaker.head)), k=50)
        state, memory = speaker.read(prompt)
        said.append(constrained(speaker, state, memory, answers))
        assert said[-1] == generated(speaker, llm, prompt, answers)
    assert len(set(said)) > 1


def test_a_prompt_repeats_its_examples_and_not_its_query(speaker, llm):
    labels = ["hot dog", "hot", "hot"]
    texts = {0: "red bread", 1: "sun", 2: "fire"}
    episode = Episode(("hot", "hot dog"), (1, 0), 2)
    intro = "Every input is words, every output one of: hot, hot dog.\n"
    context = "Input: sun\nOutput: hot\nInput: red bread\nOutput: hot dog\n"
    answers = {name: speaker.ids(f" {name}\n") for name in episode.classes}
    heard = []

    def listen(ids, memory=None):
        if memory is None:
            heard.clear()
        heard.extend(ids)
        return Speaker.read(speaker, ids, memory)

    listener = type("Listener", (), {"__getattr__": lambda _, name: getattr(speaker, name)})()
    listener.read = listen
    for repeats in (0, 1, 3):
        (alone,) = say(listener, episode, texts, labels, [repeats])
        prompt = speaker.start() + speaker.ids(
            intro + (repeats + 1) * context + "Input: fire\nOutput:"
        )
        assert heard[: len(prompt)] == prompt
        assert alone == generated(speaker, llm, prompt, answers)
        together = say(speaker, episode, texts, labels, [0, 1, 3])
        assert together[(0, 1, 3).index(repeats)] == alone


def test_episodes_are_drawn_as_the_trial_says():
    trial = Trial(ways=3, shots=2, repeats=1)
    drawn = draw(LABELS, trial, 200, seed=0)
    for episode in drawn:
        assert len(set(episode.classes)) == 3
        counts = Counter(LABELS[i] for i in episode.examples)
        assert counts == dict.fromkeys(episode.classes, 2)
        assert len({*episode.examples, episode.query}) == 7
        assert LABELS[episode.query] in episode.classes
    # Of 200 queries a third stands for the first of the names, for the last example's class.
    first = sum(LABELS[e.query] == e.classes[0] for e in drawn)
    last = sum(LABELS[e.query] == LABELS[e.examples[-1]] for e in drawn)
    assert 40 < first < 95
    assert 40 < last < 95
    assert draw(LABELS, Trial(ways=3, shots=2, repeats=3), 200, seed=0) == drawn
    assert draw(LABELS, trial, 200, seed=1) != drawn


def test_too_few_images_for_a_trial_are_told():
    with pytest.raises(ValueError, match=r"2-way 5-shot .* 2 classes of 6 images .* there are 0"):
        draw(LABELS, Trial(ways=2, shots=5, repeats=0), 1, seed=0)
    with pytest.raises(ValueError, match=r"5-way 1-shot .* there are 4"):
        draw(LABELS, Trial(ways=5, shots=1, repeats=0), 1, seed=0)
    with pytest.raises(ValueError, match="no image of the data set has a label"):
        draw([None], Trial(ways=2, shots=1, repeats=0), 1, seed=0)


def test_pictures_are_of_different_classes():
    assert pictures(LABELS, 2) == [0, 10]
    assert pictures(LABELS, 9) == [0, 5, 10, 15]


def test_words_that_are_the_labels_are_learnt_from_examples(smollm2):
    """SmolLM2 classifies by the words: right words give the right class, wrong ones another."""
    classes = ["apple", "guitar", "horse", "truck"]
    labels = [label for label in classes for _ in range(2)]
    speaker = Speaker(smollm2)
    episodes = draw(labels, Trial(ways=4, shots=1, repeats=1), 8, seed=0)
    right = dict(enumerate(labels))
    for episode in episodes:
        (answer,) = say(speaker, episode, right, labels, [1])
        assert answer == labels[episode.query]
        example = {labels[i]: i for i in episode.examples}
        other = next(c for c in classes if c != labels[episode.query])
        wrong = right | {episode.query: right[example[other]]}
        (answer,) = say(speaker, episode, wrong, labels, [1])
        assert answer == other
