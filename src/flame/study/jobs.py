"""Rule and wildcards -> a job: the files it reads and the params of its shell line.

The rules ask this module for every job, and `flame.plan` for all jobs behind some files.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flame.data import datasets
from flame.runtime.errors import known
from flame.study import files, origin, stages
from flame.study.schema.runs import FlameRun
from flame.study.settings import VERSION
from flame.study.study import Study

Paths = str | list[str]


class Job(NamedTuple):
    """The inputs and params of a job.

    Args:
        inputs: name, as in the rule's shell line -> paths.
        params: name, likewise -> value; a change is a reason to rerun the job.
        ancient: names of inputs whose modification is no reason to rerun it, because its params
            describe all that it uses of them.
    """

    inputs: Mapping[str, Paths]
    params: Mapping[str, Any]
    ancient: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """All input paths."""
        listed = ([v] if isinstance(v, str) else v for v in self.inputs.values())
        return [path for paths in listed for path in paths]


# --- downloads ------------------------------------------------------------------------------


def download_dataset(study: Study, dataset: str) -> Job:
    """A data set as shards, index and captions."""
    chosen = _find("dataset", dataset, study.datasets)
    params = {
        "source": chosen.source,
        "options": json.dumps(chosen.options),
        "seed": study.seed,
        "max_skipped": study.max_skipped,
        "version": VERSION["download"] + datasets.version(chosen.source),
    }
    return Job({}, params)


def download_llm(study: Study, llm: str) -> Job:
    """An LLM in one folder."""
    chosen = _find("llm", llm, study.llms)
    params = {
        "checkpoint": chosen.checkpoint.model_dump_json(),
        "reset": "" if chosen.reset is None else f"--reset {chosen.reset}",
        "version": VERSION["download"],
    }
    return Job({}, params)


def download_tower(study: Study, run: str) -> Job:
    """A pretrained or released tower.

    Raises:
        ValueError: the run is trained here.
    """
    _find("run", run, study.trainings)
    if study.trained(run):
        raise ValueError(f"run {run!r} is trained here: {files.output('train', run=run)}")
    return Job({}, {"settings": stages.tower(study, run).model_dump_json()})


# --- captions and embeddings ----------------------------------------------------------------


def caption(study: Study, captioner: str, dataset: str, part: str) -> Job:
    """Captions of one part of a data set."""
    inputs = {"images": _images(study, captioner, dataset)}
    settings = stages.caption(study, captioner, dataset, int(part))
    return Job(inputs, {"settings": settings.model_dump_json()})


def captions(study: Study, captioner: str, dataset: str) -> Job:
    """All captions of a data set."""
    images = _images(study, captioner, dataset)
    parts = [
        files.output("caption", captioner=captioner, dataset=dataset, part=part)
        for part in range(study.caption_parts(captioner, dataset))
    ]
    settings = stages.captions(study, captioner, dataset)
    return Job({"images": images, "parts": parts}, {"settings": settings.model_dump_json()})


def _images(study: Study, captioner: str, dataset: str) -> str:
    _find("captioner", captioner, study.captioners)
    _find("dataset", dataset, study.datasets)
    return files.dataset(dataset)


def captions_of(study: Study, dataset: str, kind: str) -> str:
    """Folder with a data set's captions of a kind: its own, or those of its captioner."""
    captioner = study.captioner_of(dataset, kind)
    if captioner is None:
        return files.dataset(dataset)
    return files.output("captions", captioner=captioner, dataset=dataset)


def prompt(study: Study, prompt: str, facet: str) -> Job:
    """The text of one facet."""
    chosen = _find("prompt", prompt, study.prompts)
    before, after = chosen.prefix
    suffix = chosen.suffix(_find("facet", facet, study.facets).text)
    return Job({}, {"text": f"{before}{{caption}}{after}{suffix}"})


def embed(study: Study, llm: str, bundle: str, kind: str, part: str) -> Job:
    """A store of embeddings.

    Raises:
        ValueError: nothing of the study reads such a store.
    """
    _find("llm", llm, study.llms)
    datasets = study.bundle_datasets(bundle, kind)
    if not datasets or int(part) >= study.parts(bundle, kind):
        store = f"{bundle}/{kind}/{part}.zarr"
        raise ValueError(f"no run, benchmark or figure of the study uses a store {store!r}")
    facets = study.embedded_facets(llm, bundle, kind)
    name = study.prompt_names[kind]
    inputs: dict[str, Paths] = {
        "llm": files.llm(llm),
        "datasets": [captions_of(study, dataset, kind) for dataset in datasets],
        "prompts": [files.output("prompt", prompt=name, facet=facet) for facet in facets],
    }
    settings = stages.embed(study, llm, bundle, kind, int(part))
    return Job(inputs, {"settings": settings.model_dump_json()})


def stores(study: Study, llm: str, bundle: str, kinds: Iterable[str]) -> list[str]:
    """All parts of the stores of some caption kinds."""
    return [
        files.output("embed", llm=llm, bundle=bundle, kind=kind, part=part)
        for kind in kinds
        for part in range(study.parts(bundle, kind))
    ]


# --- towers ---------------------------------------------------------------------------------


def train(study: Study, run: str) -> Job:
    """A tower, trained on stored embeddings, or on captions for a baseline.

    Raises:
        ValueError: the run is not trained here.
    """
    chosen = _find("run", run, study.trainings).run
    if not study.trained(run):
        raise ValueError(f"run {run!r} is not trained here: {tower(study, run)}")
    dataset, base = study.dataset_of(run), study.base(run)
    read: list[str] = []
    if isinstance(chosen, FlameRun):
        read = stores(study, chosen.llm, study.bundle(dataset), chosen.targets)
    own = [k for k in study.baseline_kinds(run) if study.captioner_of(dataset, k)]
    validated, texts = _validated(study, run)
    inputs: dict[str, Paths] = {
        "images": files.dataset(dataset),
        "stores": read,
        # A data set's own captions lie beside its images.
        "captions": list(dict.fromkeys(captions_of(study, dataset, kind) for kind in own)),
        "llm": _llm(study, run),
        "base": files.output("train", run=base) if base else [],
        "validation_datasets": validated,
        "validation_stores": texts,
    }
    params = {
        "settings": stages.train(study, run).model_dump_json(),
        "origin": json.dumps(origin.train(study, run)),
    }
    # No weights depend on what is validated.
    return Job(inputs, params, ancient=("stores", "validation_datasets", "validation_stores"))


def _validated(study: Study, run: str) -> tuple[list[str], list[str]]:
    """Data sets, and stores of their texts, that a training is validated on."""
    asked, llm = study.validation_questions(run), study.llm_of(run)
    kinds = dict.fromkeys(
        (study.bundle(q.dataset), kind) for q in asked for kind in (q.captions, q.negatives) if kind
    )
    read = [path for bundle, kind in kinds if llm for path in stores(study, llm, bundle, [kind])]
    return [files.dataset(name) for name in dict.fromkeys(q.dataset for q in asked)], read


def tower(study: Study, run: str) -> str:
    """Folder of a tower, trained here or downloaded."""
    _find("run", run, study.trainings)
    return files.output("train" if study.trained(run) else "download_tower", run=run)


def _llm(study: Study, run: str) -> Paths:
    llm = study.llm_of(run)
    return files.llm(llm) if llm else []


def evaluate(study: Study, run: str, bundle: str) -> Job:
    """Metrics and hits of a bundle of benchmarks.

    Raises:
        ValueError: no benchmark asks of this bundle.
    """
    model = tower(study, run)
    asked = study.questions(run, bundle)
    if not asked:
        raise ValueError(f"no benchmark of the study asks of bundle {bundle!r}")
    datasets = dict.fromkeys(name for q in asked for name in (q.dataset, q.train) if name)
    kinds = dict.fromkeys(kind for q in asked for kind in (q.captions, q.negatives) if kind)
    llm = study.llm_of(run)
    inputs: dict[str, Paths] = {
        "model": model,
        "datasets": [files.dataset(name) for name in datasets],
        "stores": stores(study, llm, bundle, kinds) if llm else [],
    }
    params = {
        "settings": stages.evaluate(study, run, bundle).model_dump_json(),
        "origin": json.dumps(origin.evaluate(study, run, bundle)),
    }
    return Job(inputs, params, ancient=("stores",))


def fewshot(study: Study, run: str, benchmark: str) -> Job:
    """Words of images, and few-shot classification from them.

    Raises:
        ValueError: the run has no LLM, or the benchmark is another task.
    """
    model = tower(study, run)
    chosen = _find("benchmark", benchmark, study.benchmarks)
    llm = study.llm_of(run)
    if llm is None or chosen.fewshot is None:
        raise ValueError(f"few-shot needs a FLAME run and a few-shot benchmark: {run}, {benchmark}")
    bundle = study.bundle(study.dataset_of(run))
    inputs: dict[str, Paths] = {
        "model": model,
        "llm": _llm(study, run),
        "dataset": files.dataset(chosen.dataset),
        # Training embeddings say how long the vectors are that the LLM knows.
        "stores": stores(study, llm, bundle, [chosen.captions]),
    }
    params = {
        "settings": stages.fewshot(study, run, benchmark).model_dump_json(),
        "origin": json.dumps(origin.train(study, run)),
    }
    return Job(inputs, params)


def knowledge(study: Study, llm: str) -> Job:
    """What each prompt knows, of one LLM.

    Raises:
        ValueError: the study does not probe this LLM.
    """
    block = study.knowledge
    if block is None or llm not in block.llms.values():
        raise ValueError(f"the block `knowledge` of the study does not name LLM {llm!r}")
    inputs: dict[str, Paths] = {
        "dataset": files.dataset(block.dataset),
        "stores": stores(study, llm, study.bundle(block.dataset), [block.captions]),
    }
    return Job(inputs, {"settings": stages.knowledge(study, llm).model_dump_json()})


def probes(study: Study) -> list[str]:
    """Results of the probes of every LLM."""
    llms = study.knowledge.llms.values() if study.knowledge else ()
    return [files.output("knowledge", llm=llm) for llm in dict.fromkeys(llms)]


def overhead(study: Study) -> Job:
    """Times for Figure 5.

    Raises:
        ValueError: the study takes no times.
    """
    if study.overhead is None:
        raise ValueError("the study has no block `overhead`, so nothing is timed")
    run = study.flame_run(study.overhead.run)
    inputs: dict[str, Paths] = {
        "images": files.dataset(run.dataset),
        "llm": files.llm(run.llm),
        "stores": stores(study, run.llm, study.bundle(run.dataset), run.targets),
    }
    return Job(inputs, {"settings": stages.overhead(study).model_dump_json()})


def export(study: Study, run: str) -> Job:
    """A trained FLAME in one folder, with the results that tables and figures show of it."""
    model = tower(study, run)
    settings = stages.export(study, run)
    found = [result for name in study.tables for result in study.table_comparison(name)[1]]
    found += [result for name in study.figures for result in study.figure_results(name)]
    own = dict.fromkeys(f"results/{r}.json" for r in found if r.startswith(f"evaluate/{run}/"))
    inputs: dict[str, Paths] = {"model": model, "llm": _llm(study, run), "metrics": list(own)}
    return Job(inputs, {"settings": settings.model_dump_json()})


# --- what people read -----------------------------------------------------------------------


def table(study: Study, table: str) -> Job:
    """A table of the paper."""
    _find("table", table, study.tables)
    settings = stages.table(study, table).model_dump_json()
    return Job(_metrics_and_hits(study.table_comparison(table)[1]), {"settings": settings})


def claims(study: Study) -> Job:
    """The list of claims."""
    inputs = _metrics_and_hits(study.claims_comparison(study.claims.values())[1])
    ratios = any(claim.ratio for claim in study.claims.values())
    inputs["overhead"] = [files.output("overhead")] if ratios else []
    known = any(claim.knows for claim in study.claims.values())
    inputs["probes"] = [path.replace(".json", ".parquet") for path in probes(study) if known]
    return Job(inputs, {"settings": stages.claims(study).model_dump_json()})


def variance(study: Study) -> Job:
    """How much the numbers of all tables vary."""
    inputs = _metrics_and_hits(study.variance_comparison()[1])
    return Job(inputs, {"settings": stages.variance(study).model_dump_json()})


def knowledge_table(study: Study) -> Job:
    """The table of what each prompt knows.

    Raises:
        ValueError: the study probes no LLM.
    """
    if study.knowledge is None:
        raise ValueError("the study has no block `knowledge`, so no prompt is probed")
    settings = stages.knowledge_table(study).model_dump_json()
    return Job({"metrics": probes(study)}, {"settings": settings})


def appendix(study: Study, appendix: str) -> Job:
    """A table of the study itself."""
    _find("appendix", appendix, study.appendix)
    return Job({}, {"settings": stages.appendix(study, appendix).model_dump_json()})


def figure(study: Study, figure: str) -> Job:
    """A figure."""
    chosen = _find("figure", figure, study.figures)
    results = [f"results/{result}" for result in study.figure_results(figure)]
    inputs: dict[str, Paths] = {"files": chosen.inputs(study, results)}
    return Job(inputs, {"settings": stages.figure(study, figure).model_dump_json()})


def _metrics_and_hits(results: Iterable[str]) -> dict[str, Paths]:
    paths = [f"results/{result}" for result in results]
    return {
        "metrics": files.with_suffix(paths, "json"),
        "hits": files.with_suffix(paths, "parquet"),
    }


def _find(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry of a name that a wildcard gave, or an error with the known names."""
    if name not in table:
        raise ValueError(f"unknown {kind} {known(name, table)}")
    return table[name]


# --- all jobs -------------------------------------------------------------------------------

JOBS: dict[str, Callable[..., Job]] = {
    "download_dataset": download_dataset,
    "download_llm": download_llm,
    "download_tower": download_tower,
    "caption": caption,
    "captions": captions,
    "prompt": prompt,
    "embed": embed,
    "train": train,
    "evaluate": evaluate,
    "fewshot": fewshot,
    "knowledge": knowledge,
    "overhead": overhead,
    "export": export,
    "table": table,
    "claims": claims,
    "variance": variance,
    "knowledge_table": knowledge_table,
    "appendix": appendix,
    "figure": figure,
}


# Rule and pattern of every output. Names may hold dots, so the longer ending is tried first.
PATTERNS = sorted(
    ((rule, pattern) for rule, patterns in files.OUTPUTS.items() for pattern in patterns),
    key=lambda each: each[1].rpartition("}")[2].count("."),
    reverse=True,
)


class Planned(NamedTuple):
    """A job of a study.

    Args:
        rule: key of `JOBS`.
        wildcards: of its output.
        job: the job.
    """

    rule: str
    wildcards: Mapping[str, str]
    job: Job


def producer(study: Study, path: str) -> tuple[str, dict[str, str]]:
    """Rule and wildcards of the job that writes a file or folder.

    Raises:
        ValueError: no rule writes it.
    """
    for rule, pattern in PATTERNS:
        match = re.fullmatch(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(pattern)), path)
        # Tables and the appendix share results/<name>.csv.
        if match and (rule != "table" or match["table"] in study.tables):
            return rule, match.groupdict()
    raise ValueError(f"no rule writes {path!r}")


def closure(study: Study, targets: Iterable[str]) -> Iterator[Planned]:
    """Every job behind some files, once, in no particular order.

    Args:
        study: the study.
        targets: paths of files.
    """
    seen: set[tuple[str, str]] = set()
    waiting = list(targets)
    while waiting:
        rule, wildcards = producer(study, waiting.pop())
        if (rule, str(wildcards)) in seen:
            continue
        seen.add((rule, str(wildcards)))
        job = JOBS[rule](study, **wildcards)
        yield Planned(rule, wildcards, job)
        waiting += job.paths


def targets(study: Study) -> list[str]:
    """Every table, figure and list of the study: what `rule all` asks for."""
    found = [files.output("table", table=name) for name in study.tables]
    found += [files.output("appendix", appendix=name) for name in study.appendix]
    found += [files.output("figure", figure=name) for name in study.figures]
    found += [files.output("variance")] if study.tables else []
    found += [files.output("knowledge_table")] if study.knowledge else []
    return found + ([files.output("claims")] if study.claims else [])


def training_bundles(study: Study) -> set[str]:
    """Bundles that some run is trained on: their stores are embedded first."""
    trained = filter(study.trained, study.trainings)
    return {study.bundle(study.dataset_of(name)) for name in trained}


def captioners_by_vllm(study: Study) -> set[str]:
    """Captioners that need vLLM, and so a conda environment of their own."""
    return {name for name, who in study.captioners.items() if who.engine == "vllm"}
