"""Visual tower, images and frozen LLM -> few-shot classification by words (Section C.3, Table C5).

Every image becomes a few words (`flame.evaluation.vocabulary`); the LLM reads examples
`words -> label` and then says the label of one more image. Nothing is trained.
"""

import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from flame.data.images import ImageReader
from flame.embedding import provenance
from flame.embedding.store import Embeddings, by_kind
from flame.evaluation.bootstrap import rate
from flame.evaluation.vocabulary import Mapper, Speaker, Words, place
from flame.runtime import command, progress
from flame.runtime.checksums import sha256
from flame.runtime.errors import known
from flame.runtime.resumable import write_atomic
from flame.study.schema.benchmarks import Trial
from flame.study.settings import FewShotSettings, FlameTraining
from flame.towers.flame import FlameTower
from flame.towers.load import load

log = logging.getLogger(__name__)


class Episode(NamedTuple):
    """One question: examples of some classes, and an image of one of them."""

    classes: tuple[str, ...]
    examples: tuple[int, ...]
    """Images of the context, each class `shots` times, in the order in which they are read."""
    query: int
    """An image of one of the classes that is no example."""


def fewshot(
    model: Path,
    llm: Path,
    dataset: Path,
    stores: list[Path],
    out: Path,
    hits: Path,
    words: Path,
    settings: FewShotSettings,
    threads: int = 1,
    batch_size: int = 64,
) -> None:
    """Let the frozen LLM name images that it knows by their words only.

    Args:
        model: folder of the trained tower.
        llm: folder of the LLM on whose embeddings it was trained.
        dataset: folder of the labelled images.
        stores: stores of the training captions: every part of the kind in the settings.
        out: JSON to write, one record with a metric for every trial.
        hits: Parquet to write, hit or miss of every episode; its key is that of the query.
        words: JSON to write, the words of some images, position by position (Figure C1).
        settings: the trials.
        threads: CPU threads.
        batch_size: images per forward pass; changes speed and memory.
    """
    started = time.monotonic()
    torch.set_num_threads(threads)
    reader = ImageReader(dataset)
    chosen = settings.fewshot
    episodes = {
        trial: draw(reader.labels, trial, chosen.episodes, settings.seed) for trial in chosen.trials
    }
    speaker = Speaker(llm)
    mapper = _mapper(model, llm, speaker, stores, settings, batch_size)
    shown = pictures(reader.labels, chosen.pictures)
    used = {i for drawn in episodes.values() for e in drawn for i in (*e.examples, e.query)}
    rows = sorted(used)
    texts = dict(zip(rows, mapper.texts(reader, rows, chosen.pool), strict=True))
    grids = mapper.words(reader, shown, chosen.picture_pool)
    answers = _classify(speaker, reader, texts, episodes, settings.run)
    result = {
        "settings": settings.model_dump(mode="json"),
        "records": [_record(settings, answers, len(used))],
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in ("timm", "torch", "transformers")},
    }
    write_atomic(words, _json(_figure(speaker, reader, shown, grids)))
    write_atomic(hits, _frame(settings.benchmark, answers).write_parquet)
    write_atomic(out, _json(result))


def draw(labels: Sequence[str | None], trial: Trial, episodes: int, seed: int) -> list[Episode]:
    """Episodes of one trial; trials that differ in their repetitions only have the same ones.

    Args:
        labels: class of every image; images without one take no part.
        trial: ways and shots.
        episodes: how many.
        seed: of all draws.

    Raises:
        ValueError: fewer classes than ways that have an image more than shots.
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
        # Neither the order of the examples nor that of the names may tell the query's class.
        rng.shuffle(examples)
        drawn.append(Episode(tuple(sorted(classes)), tuple(examples), query))
    return drawn


def pictures(labels: Sequence[str | None], count: int) -> list[int]:
    """Images to be shown: the first of each of `count` classes, spread over all of them."""
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
    """The class that the LLM names, for every number of repetitions.

    The prompt has the parts of the release's: a line that names the classes; the examples,
    `repeats` + 1 times; the query. What several numbers of repetitions share is read once.

    Args:
        speaker: frozen LLM.
        episode: what is asked.
        texts: image -> its words.
        labels: class of every image.
        repeats: numbers of repetitions, in ascending order.
    """

    def question(image: int) -> list[int]:
        return speaker.ids(f"Input: {texts[image]}\nOutput:")

    # An answer is tokenised apart from its question, so that it has the same tokens everywhere;
    # the end of its line tells "hot" from "hot dog".
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
    """The answer that greedy decoding ends in, if only tokens that lead to an answer may follow.

    Args:
        speaker: frozen LLM.
        state: (D,) last hidden state of the prompt.
        memory: of the prompt; is changed.
        answers: name -> tokens; none may begin another.
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


def _by_label(labels: Sequence[str | None]) -> dict[str, list[int]]:
    """Class -> its images, in alphabetical order of the classes."""
    images = defaultdict(list)
    for i, label in enumerate(labels):
        if label is not None:
            images[label].append(i)
    if not images:
        raise ValueError("no image of the data set has a label")
    return {label: images[label] for label in sorted(images)}


def _mapper(
    model: Path,
    llm: Path,
    speaker: Speaker,
    stores: list[Path],
    settings: FewShotSettings,
    batch_size: int,
) -> Mapper:
    """The tower with where its features lie.

    Raises:
        ValueError: a tower or a store that does not belong to the LLM's head.
    """
    if not settings.final_norm:
        raise ValueError("final_norm is false: the LLM's head reads states after the final norm")
    tower, record = load(model)
    if not isinstance(tower, FlameTower):
        raise ValueError(
            f"{model} was trained by method {record['settings']['method']!r}, "
            "whose features no LLM reads; known for it: 'flame'"
        )
    training = FlameTraining.model_validate(record["settings"])
    parts, kind, facet = by_kind(stores), settings.captions, settings.fewshot.facet
    if kind not in parts:
        raise ValueError(f"no embeddings of captions of kind {known(kind, parts)}")
    texts = Embeddings.open(parts[kind], training.dataset)
    layer = texts.attributes.get("layer", "last")
    if layer not in ("last", speaker.num_layers):
        raise ValueError(
            f"the captions' embeddings are of layer {layer}: the LLM's head reads the last, "
            f"{speaker.num_layers}"
        )
    if not tower.dim == texts.dim == speaker.dim:
        raise ValueError(
            f"the tower has features of width {tower.dim}, its captions' embeddings {texts.dim}, "
            f"the LLM's head reads {speaker.dim}"
        )
    if "texts" in record:
        provenance.check(record["texts"], texts, [facet], kind)
    checkpoint = sha256(llm / "flame.json")
    if texts.attributes.get("checkpoint", checkpoint) != checkpoint:
        raise ValueError(
            f"{llm} is not the LLM {texts.attributes['llm']!r} that embedded the captions: its "
            f"flame.json has sha256 {checkpoint}, not {texts.attributes['checkpoint']}"
        )
    centers = tower.centers.get(kind, {})
    if tower.centers and facet not in centers:
        raise ValueError(
            f"the tower has no center of {kind} captions and facet {known(facet, centers)}"
        )
    return Mapper(tower, training, speaker, place(texts, facet, centers.get(facet)), batch_size)


def _classify(
    speaker: Speaker,
    reader: ImageReader,
    texts: Mapping[int, str],
    episodes: Mapping[Trial, Sequence[Episode]],
    run: str,
) -> dict[str, pl.DataFrame]:
    """Metric -> one row per episode: query, key, hit, best."""
    groups: dict[tuple[int, int], list[Trial]] = defaultdict(list)
    for trial in sorted(episodes, key=lambda trial: trial.repeats):
        groups[trial.ways, trial.shots].append(trial)
    said: dict[Trial, list[str]] = {trial: [] for trial in episodes}
    with progress.bar(sum(map(len, episodes.values())), "answers", f"fewshot {run}") as bar:
        for trials in groups.values():
            repeats = [trial.repeats for trial in trials]
            for episode in episodes[trials[0]]:
                answers = say(speaker, episode, texts, reader.labels, repeats)
                for trial, answer in zip(trials, answers, strict=True):
                    said[trial].append(answer)
                bar.update(len(trials))
    tables = {}
    for trial, answers in said.items():
        queries = [episode.query for episode in episodes[trial]]
        labels = [reader.labels[i] for i in queries]
        tables[trial.metric] = pl.DataFrame(
            {
                "query": range(len(queries)),
                "key": [reader.keys[i] for i in queries],
                "hit": [a == label for a, label in zip(answers, labels, strict=True)],
                "best": answers,
            }
        )
    return tables


def _record(
    settings: FewShotSettings, tables: Mapping[str, pl.DataFrame], images: int
) -> dict[str, Any]:
    """What the JSON says, as that of `flame.evaluate`; values and 95 % intervals in percent."""
    metrics = {}
    for name, table in tables.items():
        hits = int(table["hit"].sum())
        metrics[name] = rate(hits, len(table), **settings.bootstrap.model_dump())
        log.info("%s: %s %.1f %%", settings.benchmark, name, metrics[name]["value"])
    return {
        "run": settings.run,
        "benchmark": settings.benchmark,
        "task": "fewshot",
        "dataset": settings.dataset,
        "captions": settings.captions,
        "images": images,
        "metrics": metrics,
    }


def _frame(benchmark: str, tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One row per episode and metric: benchmark, metric, query, key, hit, best.

    Column `query` is the number of the episode, `key` that of its query image, `best` what the LLM
    said.
    """
    return pl.concat(
        table.select(pl.lit(benchmark).alias("benchmark"), pl.lit(name).alias("metric"), pl.all())
        for name, table in tables.items()
    )


def _figure(
    speaker: Speaker, reader: ImageReader, images: Sequence[int], words: Words
) -> list[dict[str, Any]]:
    """Key and label of some images, with the word and its probability at every position."""
    return [
        {
            "key": reader.keys[image],
            "label": reader.labels[image],
            "words": [[speaker.text(token) for token in line] for line in words.tokens[n].tolist()],
            "probabilities": words.probabilities[n].tolist(),
        }
        for n, image in enumerate(images)
    ]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


if __name__ == "__main__":
    command.main(fewshot)
