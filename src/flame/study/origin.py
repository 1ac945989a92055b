"""What is behind the files that a job reads, where the files themselves are no reason to rerun it.

A store holds more facets than a run uses, and is rewritten when any of them changes. So `train` and
`evaluate` take stores as `ancient`, and what decides the content that they use is a parameter.
"""

from collections.abc import Iterable
from typing import Any

from flame.study import stages
from flame.study.schema.runs import FlameRun
from flame.study.settings import VERSION
from flame.study.study import Study


def stores(
    study: Study, llm: str, facets: Iterable[tuple[str, str]], datasets: Iterable[str]
) -> dict[str, Any]:
    """All that decides the content of data sets and of some facets of their stores.

    Args:
        study: the study.
        llm: the frozen LLM.
        facets: caption kind and facet, of each facet in use.
        datasets: the data sets in use.
    """
    facets, datasets = list(facets), list(datasets)
    pairs = [(study.bundle(name), kind) for name in datasets for kind, _ in facets]
    return {
        "llm": study.llms[llm].model_dump(mode="json"),
        "embedding": study.embedding.model_dump(mode="json", exclude={"facets"}),
        "words": [_words(study, *facet) for facet in dict.fromkeys(facets)],
        "datasets": {name: dataset(study, name) for name in datasets},
        "parts": {f"{bundle}/{kind}": study.parts(bundle, kind) for bundle, kind in pairs},
        "seed": study.seed,
        "versions": [VERSION["download"], VERSION["embed"]],
    }


def _words(study: Study, kind: str, facet: str) -> list[str]:
    prompt = study.prompt_of(kind)
    return [kind, facet, *prompt.prefix, prompt.suffix(study.facets[facet].text)]


def dataset(study: Study, name: str) -> dict[str, Any]:
    """All that decides the images and captions of a data set."""
    chosen = study.datasets[name]
    content = chosen.model_dump(mode="json", include={"source", "options"})
    if chosen.captioner is not None:
        captions = stages.captions(study, chosen.captioner, name)
        content["captions"] = captions.model_dump(mode="json")
    return content


def train(study: Study, training: str) -> dict[str, Any]:
    """What is behind the files of a training, down to the words of its facets."""
    run = study.run(training)
    if not study.trained(training):
        return stages.tower(study, training).model_dump(mode="json")
    name = study.dataset_of(training)
    if isinstance(run, FlameRun):
        facets = [(kind, facet) for kind, fs in study.targets(training).items() for facet in fs]
        return stores(study, run.llm, facets, [name])
    base = study.base(training)
    return {
        "datasets": {name: dataset(study, name)},
        "seed": study.seed,
        "versions": [VERSION["download"]],
        "base": base and [stages.train(study, base).model_dump(), train(study, base)],
    }


def evaluate(study: Study, training: str, bundle: str) -> list[Any]:
    """What is behind the files of an evaluation: those of the tower, and its own."""
    run, asked = study.run(training), study.questions(training, bundle)
    names = [name for q in asked for name in (q.dataset, q.train) if name]
    own: dict[str, Any] = {name: dataset(study, name) for name in names}
    if isinstance(run, FlameRun):
        kinds = [(q, kind) for q in asked for kind in (q.captions, q.negatives) if kind]
        facets = [(kind, facet) for q, kind in kinds for facet in q.facets]
        own = stores(study, run.llm, facets, dict.fromkeys(names))
    behind = train(study, training)
    if not study.trained(training):
        return [behind, own]
    return [stages.train(study, training).model_dump(mode="json"), behind, own]
