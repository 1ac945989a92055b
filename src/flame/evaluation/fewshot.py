"""Few-shot classification by words: episodes, prompts, constrained answers (Section C.3, Table C5).

Every image becomes a few words (`flame.evaluation.vocabulary`). The LLM reads examples
`words -> label` and then names the label of one more image. Nothing is trained.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flame.data.images import ImageReader
from flame.evaluation.tasks import Answer, Hits
from flame.evaluation.vocabulary import Speaker, Words
from flame.study.schema.benchmarks import Trial


class Episode(NamedTuple):
    """One query: examples of some classes, and an image of one of them."""

    classes: tuple[str, ...]
    examples: tuple[int, ...]
    """Images of the context in the order of the prompt, `shots` of each class."""
    query: int
    """An image of one of the classes, not among the examples."""


def draw(labels: Sequence[str | None], trial: Trial, episodes: int, seed: int) -> list[Episode]:
    """Episodes of one trial; the same ones for trials that differ only in their repetitions.

    Args:
        labels: class of every image; images without one are not used.
        trial: ways and shots.
        episodes: number of episodes.
        seed: of all draws.

    Raises:
        ValueError: fewer classes than ways have more images than shots.
    """
    rng = random.Random(f"{seed}/{trial.ways}/{trial.shots}")
    images = _by_label(labels)
    able = [label for label, rows in images.items() if len(rows) > trial.shots]
    if len(able) < trial.ways:
        raise ValueError(
            f"{trial.metric} needs {trial.ways} classes of {trial.shots + 1} images each, "
            f"there are {len(able)}"
        )
    drawn = []
    for _ in range(episodes):
        classes = rng.sample(able, trial.ways)
        query, *examples = rng.sample(images[classes[0]], trial.shots + 1)
        for label in classes[1:]:
            examples += rng.sample(images[label], trial.shots)
        # Neither the order of the examples nor that of the names may give the query's class away.
        rng.shuffle(examples)
        drawn.append(Episode(tuple(sorted(classes)), tuple(examples), query))
    return drawn


def pictures(labels: Sequence[str | None], count: int) -> list[int]:
    """Images for a figure: the first image of each of `count` classes, evenly spaced."""
    firsts = [rows[0] for rows in _by_label(labels).values()]
    count = min(count, len(firsts))
    return [firsts[n * len(firsts) // count] for n in range(count)]


def say(
    speaker: Speaker,
    episode: Episode,
    texts: Mapping[int, str],
    labels: Sequence[str | None],
    repeats: Sequence[int],
) -> list[str]:
    """Class that the LLM names, for every number of repetitions.

    The prompt has the parts of the release's: a line that names the classes; the examples,
    `repeats` + 1 times; the query. What the prompts share is read only once.

    Args:
        speaker: frozen LLM.
        episode: examples and query.
        texts: image -> its words.
        labels: class of every image.
        repeats: numbers of repetitions, in ascending order.
    """

    def question(image: int) -> list[int]:
        return speaker.ids(f"Input: {texts[image]}\nOutput:")

    # Answers are tokenised apart from the questions, so that they have the same tokens everywhere;
    # the line feed at their end tells "hot" from "hot dog".
    end = speaker.ids("\n")
    answers = {label: speaker.ids(f" {label}") + end for label in episode.classes}
    names = ", ".join(episode.classes)
    ids = speaker.start() + speaker.ids(f"Every input is words, every output one of: {names}.\n")
    context = [t for i in episode.examples for t in question(i) + answers[str(labels[i])]]
    query = question(episode.query)
    said, read, memory = [], 0, None
    for count in repeats:
        ids += context * (count + 1 - read)
        read = count + 1
        if count < repeats[-1]:
            _, memory = speaker.read(ids, memory)
            ids = []
        state, branch = speaker.read(ids + query, deepcopy(memory))
        said.append(constrained(speaker, state, branch, answers))
    return said


def constrained(
    speaker: Speaker, state: Tensor, memory: Any, answers: Mapping[str, Sequence[int]]
) -> str:
    """Answer by greedy decoding, restricted to tokens that lead to one of the answers.

    Args:
        speaker: frozen LLM.
        state: (D,) last hidden state of the prompt.
        memory: key-value cache of the prompt; is changed.
        answers: name -> tokens; none may be a prefix of another.
    """
    alive, place = list(answers), 0
    while len(alive) > 1:
        allowed = sorted({answers[name][place] for name in alive})
        token = allowed[int(speaker.scores(state, allowed).argmax())]
        alive = [name for name in alive if answers[name][place] == token]
        place += 1
        if len(alive) > 1:
            state, memory = speaker.read([token], memory)
    return alive[0]


def classify(
    speaker: Speaker,
    reader: ImageReader,
    texts: Mapping[int, str],
    episodes: Mapping[Trial, Sequence[Episode]],
    on_answers: Callable[[int], Any],
) -> Answer:
    """Hits of every episode, one metric per trial; `best` is the answer of the LLM.

    Args:
        speaker: frozen LLM.
        reader: images of the data set.
        texts: image -> its words.
        episodes: trial -> its episodes.
        on_answers: called with the number of answers after each step.
    """
    groups: dict[tuple[int, int], list[Trial]] = defaultdict(list)
    for trial in sorted(episodes, key=lambda trial: trial.repeats):
        groups[trial.ways, trial.shots].append(trial)
    said: dict[Trial, list[str]] = {trial: [] for trial in episodes}
    for trials in groups.values():
        repeats = [trial.repeats for trial in trials]
        for episode in episodes[trials[0]]:
            answers = say(speaker, episode, texts, reader.labels, repeats)
            for trial, answer in zip(trials, answers, strict=True):
                said[trial].append(answer)
            on_answers(len(trials))
    metrics = {}
    for trial, answers in said.items():
        queries = [episode.query for episode in episodes[trial]]
        labels = [reader.labels[i] for i in queries]
        hit = torch.tensor([a == label for a, label in zip(answers, labels, strict=True)])
        metrics[trial.metric] = Hits([reader.keys[i] for i in queries], hit, best=answers)
    return Answer(metrics, images=len(used_images(episodes)), texts=0, unjoined=0)


def used_images(episodes: Mapping[Trial, Sequence[Episode]]) -> list[int]:
    """Images of all episodes, in ascending order."""
    return sorted({i for drawn in episodes.values() for e in drawn for i in (*e.examples, e.query)})


def word_grids(
    speaker: Speaker, reader: ImageReader, images: Sequence[int], words: Words
) -> list[dict[str, Any]]:
    """Key and label of some images, with word and probability at every position (Figure C1)."""
    return [
        {
            "key": reader.keys[image],
            "label": reader.labels[image],
            "words": [[speaker.text(token) for token in line] for line in words.tokens[n].tolist()],
            "probabilities": words.probabilities[n].tolist(),
        }
        for n, image in enumerate(images)
    ]


def _by_label(labels: Sequence[str | None]) -> dict[str, list[int]]:
    """Class -> its images; classes in alphabetical order."""
    images = defaultdict(list)
    for i, label in enumerate(labels):
        if label is not None:
            images[label].append(i)
    if not images:
        raise ValueError("no image of the data set has a label")
    return {label: images[label] for label in sorted(images)}
