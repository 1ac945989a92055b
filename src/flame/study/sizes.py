"""How much data a study has: rows of captions, queries of results, bytes of an image."""

from collections.abc import Iterable

from flame.data.datasets import module
from flame.study.schema.benchmarks import FEWSHOT
from flame.study.study import Study

# Characters of a caption by its kind, from the caption lengths that DreamLIP published.
CHARACTERS = {"raw": 80, "short": 110, "long": 600}
OTHER_CHARACTERS = 80  # class texts, pairs of captions
IMAGE_BYTES = 60_000  # of an encoded image, if the size of the download is not published
CLASS_TEXTS = 80_000  # classes x templates, at most: ImageNet's in English and in Chinese
CLASSES = 1_000  # at most, again ImageNet's
METRICS = {"retrieval": 3, "zeroshot": 2, "compose": 3, "probe": 1}  # by task, of every query


def characters(kind: str) -> int:
    """Characters of a caption of a kind, on average."""
    return CHARACTERS.get(kind, OTHER_CHARACTERS)


def image_bytes(study: Study, dataset: str) -> float:
    """Bytes of an encoded image of a data set, on average."""
    card = module(study.datasets[dataset].source).CARD
    images = max(sum(card.splits.values()), study.datasets[dataset].images)
    return max(IMAGE_BYTES, (card.bytes or 0) / images)


def texts(study: Study, dataset: str, kind: str) -> int:
    """Captions of a kind in a data set, at most; a captioner writes one an image."""
    chosen = study.datasets[dataset]
    if kind == "class":
        return CLASS_TEXTS
    if study.captioner_of(dataset, kind) is not None:
        return chosen.images
    return module(chosen.source).CARD.captions * chosen.images


def store_rows(study: Study, bundle: str, kind: str) -> int:
    """Captions that the stores of a kind in a bundle hold, in all parts."""
    return sum(texts(study, name, kind) for name in study.bundle_datasets(bundle, kind))


def own_kinds(study: Study, dataset: str) -> set[str]:
    """Caption kinds that a data set comes with, of those that the study uses, and its raw ones."""
    kinds = {"raw"}
    for name in filter(study.trained, study.trainings):
        if study.dataset_of(name) == dataset:
            run = study.run(name)
            kinds.update(getattr(run, "targets", ()), study.baseline_kinds(name))
    for benchmark in study.benchmarks.values():
        if benchmark.dataset == dataset:
            kinds.update(kind for kind in (benchmark.captions, benchmark.negatives) if kind)
    return {kind for kind in kinds if study.captioner_of(dataset, kind) is None}


def queries(study: Study, results: Iterable[str]) -> int:
    """Rows of the hits in some results, which are paths below `results` without extensions."""
    return sum(_queries(study, *result.split("/")) for result in results)


def _queries(study: Study, stage: str, run: str, name: str) -> int:
    if stage == FEWSHOT:
        fewshot = study.benchmarks[name].fewshot
        return fewshot.episodes * len(fewshot.trials) if fewshot else 0
    rows = 0
    for question in study.questions(run, name):
        images = study.datasets[question.dataset].images
        both = texts(study, question.dataset, question.captions or "")
        asked = images + both if question.task == "retrieval" else images
        rows += asked * METRICS.get(question.task, max(METRICS.values()))
    return rows
