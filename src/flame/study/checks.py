"""Mistakes in a study whose blocks are each valid: names that refer to nothing, missing files."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flame.data.datasets import module
from flame.runtime.errors import known
from flame.study.schema.benchmarks import FEWSHOT, Benchmark, task_names
from flame.study.schema.knowledge import Knowledge
from flame.study.schema.llms import FolderCheckpoint
from flame.study.schema.runs import ClipRun, FlameRun, LongClipRun, PretrainedRun, Run, Validation
from flame.study.schema.tables import Measure
from flame.study.study import Study

# Sections whose names become parts of paths.
IN_PATHS = (
    "datasets",
    "captioners",
    "llms",
    "facets",
    "prompts",
    "runs",
    "tables",
    "appendix",
    "figures",
)
MARKUP = re.compile(r"<(?=/?script|!--)", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")

Mistakes = Iterator[tuple[str, str]]  # dotted path of a key, and what is wrong there


def mistakes(study: Study) -> Mistakes:
    """Path and text of every reference to a name that the study does not define."""
    yield from _name_mistakes(study)
    yield from _prompt_mistakes(study)
    for name, dataset in study.datasets.items():
        if dataset.captioner is not None and dataset.captioner not in study.captioners:
            captioners = known(dataset.captioner, study.captioners)
            yield f"datasets.{name}.captioner", f"unknown captioner {captioners}"
    for name, run in study.runs.items():
        yield from _run_mistakes(study, f"runs.{name}", run)
    if study.validation is not None:
        yield from _validation_mistakes(study, "validation", study.validation)
    for name, benchmark in study.benchmarks.items():
        yield from _benchmark_mistakes(study, f"benchmarks.{name}", benchmark)
    for path, run_names, measures in _uses(study):
        for name in run_names:
            if name not in study.runs:
                yield path, f"unknown run {known(name, study.runs)}"
        for measure in measures:
            if measure.benchmark not in study.benchmarks:
                benchmarks = known(measure.benchmark, study.benchmarks)
                yield path, f"unknown benchmark {benchmarks}"
    for name, figure in study.figures.items():
        for key, text in figure.mistakes(study):
            yield f"figures.{name}.{key}", text
    yield from _table_mistakes(study)
    yield from _overhead_mistakes(study)
    if study.knowledge is not None:
        yield from _knowledge_mistakes(study, study.knowledge)


def _uses(study: Study) -> Iterator[tuple[str, Iterable[str], Iterable[Measure]]]:
    """Path of every block that asks for metrics; the runs and the measures it names."""
    for name, table in study.tables.items():
        for i, row in enumerate(table.rows):
            yield f"tables.{name}.rows.{i}.run", filter(None, (row.run, row.gain_over)), ()
        for i, column in enumerate(table.columns):
            yield f"tables.{name}.columns.{i}", (), column.measures
    for name, claim in study.claims.items():
        yield f"claims.{name}", claim.runs, claim.measures
    for name, figure in study.figures.items():
        yield f"figures.{name}", *figure.uses()


def _name_mistakes(study: Study) -> Mistakes:
    """Names that become parts of paths, and so of commands."""
    asked_alone = [n for n, benchmark in study.benchmarks.items() if benchmark.task == "fewshot"]
    for section, names in {
        **{section: list(getattr(study, section)) for section in IN_PATHS},
        "benchmarks": asked_alone,
        "datasets.*.bundle": [d.bundle for d in study.datasets.values() if d.bundle],
        "prompts.*.captions": [kind for p in study.prompts.values() for kind in p.captions],
    }.items():
        for name in names:
            if not NAME.fullmatch(name):
                yield (
                    section,
                    f"{name!r} becomes part of a path: a name starts with a letter, a digit or _ "
                    "and contains only these, '.', '+' and '-'",
                )


def _prompt_mistakes(study: Study) -> Mistakes:
    owner: dict[str, str] = {}
    for name, prompt in study.prompts.items():
        for facet in prompt.facets:
            if facet not in study.facets:
                yield f"prompts.{name}.facets", f"unknown facet {known(facet, study.facets)}"
        for kind in prompt.captions:
            if kind in owner:
                yield (
                    f"prompts.{name}.captions",
                    f"kind {kind!r} already belongs to prompt {owner[kind]!r}",
                )
            owner[kind] = name


def _run_mistakes(study: Study, path: str, run: Run) -> Mistakes:
    for key, table in (
        ("dataset", study.datasets),
        ("llm", study.llms),
        ("backbone", study.backbones),
        ("text_tower", study.text_towers),
        ("recipe", study.recipes),
    ):
        value = getattr(run, key, None)
        if value is not None and value not in table:
            yield f"{path}.{key}", f"unknown {key} {known(value, table)}"
    if isinstance(run, LongClipRun) and not isinstance(study.runs.get(run.base), ClipRun):
        clips = [name for name, other in study.runs.items() if isinstance(other, ClipRun)]
        yield f"{path}.base", f"no CLIP run {known(run.base, clips)}"
    seeds = study.seeds or (study.seed,)
    if not isinstance(run, PretrainedRun):
        seeds = run.seeds or seeds
        if len(set(seeds)) < len(seeds):
            yield f"{path}.seeds", f"{list(seeds)} has a seed twice"
    if isinstance(run, FlameRun):
        if len(run.draws) not in (1, len(seeds)):
            draws = f"{len(run.draws)} draws for {len(seeds)} seeds"
            yield f"{path}.draws", f"{draws} {list(seeds)}: give one draw, or one for each seed"
        yield from _target_mistakes(study, path, run)
    if not isinstance(run, PretrainedRun) and run.validation is not None:
        yield from _validation_mistakes(study, f"{path}.validation", run.validation)


def _target_mistakes(study: Study, path: str, run: FlameRun) -> Mistakes:
    for kind, choice in run.targets.items():
        here = f"{path}.targets.{kind}"
        if kind not in study.prompt_names:
            yield here, f"no prompt embeds captions of kind {known(kind, study.prompt_names)}"
            continue
        prompt = study.prompt_names[kind]
        embedded = study.prompts[prompt].facets
        if isinstance(choice, int) and choice > len(embedded):
            yield here, f"{choice} facets wanted, prompt {prompt!r} embeds {len(embedded)}"
        for facet in choice if isinstance(choice, tuple) else ():
            if facet not in embedded:
                yield here, f"facet not embedded by prompt {prompt!r}: {known(facet, embedded)}"


def _validation_mistakes(study: Study, path: str, validation: Validation) -> Mistakes:
    fitting = [n for n, b in study.benchmarks.items() if b.task not in (FEWSHOT, "probe")]
    for name in validation.benchmarks:
        if name not in study.benchmarks:
            yield f"{path}.benchmarks", f"unknown benchmark {known(name, fitting)}"
        elif name not in fitting:
            task = study.benchmarks[name].task
            yield (
                f"{path}.benchmarks",
                f"{name!r} is no validation, because its task {task!r} needs more than images and "
                f"texts; fitting: {', '.join(fitting)}",
            )


def _benchmark_mistakes(study: Study, path: str, benchmark: Benchmark) -> Mistakes:
    tasks = task_names()
    if benchmark.task not in tasks:
        yield f"{path}.task", f"unknown task {known(benchmark.task, tasks)}"
    for key in ("dataset", "train"):
        name = getattr(benchmark, key)
        if name is not None and name not in study.datasets:
            yield f"{path}.{key}", f"unknown dataset {known(name, study.datasets)}"
    for key in ("captions", "negatives"):
        kind = getattr(benchmark, key)
        if kind is not None and kind not in study.prompt_names:
            kinds = known(kind, study.prompt_names)
            yield f"{path}.{key}", f"no prompt embeds captions of kind {kinds}"
            return
    if benchmark.captions is None:
        return
    embedded = study.prompt_of(benchmark.captions).facets
    for facet in benchmark.facets if isinstance(benchmark.facets, tuple) else ():
        if facet not in embedded:
            yield f"{path}.facets", f"facet not embedded: {known(facet, embedded)}"


def _table_mistakes(study: Study) -> Mistakes:
    for name, table in study.appendix.items():
        if table.recipe is not None and table.recipe not in study.recipes:
            recipes = known(table.recipe, study.recipes)
            yield f"appendix.{name}.recipe", f"unknown recipe {recipes}"
    for name, claim in study.claims.items():
        labels = study.knowledge.llms if study.knowledge else {}
        for label in (claim.knows.llm, claim.knows.beyond) if claim.knows else ():
            if label is not None and label not in labels:
                yield f"claims.{name}.knows", f"no LLM of `knowledge` {known(label, labels)}"
        if claim.table is not None and claim.table not in study.tables:
            yield f"claims.{name}.table", f"unknown table {known(claim.table, study.tables)}"


def _overhead_mistakes(study: Study) -> Mistakes:
    if study.overhead is None:
        if any(claim.ratio for claim in study.claims.values()):
            yield "overhead", "is missing, but a claim needs it"
        return
    for key, kind in (("run", FlameRun), ("baseline", ClipRun)):
        name = getattr(study.overhead, key)
        if not isinstance(study.runs.get(name), kind):
            fitting = [n for n, run in study.runs.items() if isinstance(run, kind)]
            yield f"overhead.{key}", f"no {kind.__name__} {known(name, fitting)}"


def _knowledge_mistakes(study: Study, block: Knowledge) -> Mistakes:
    for llm in block.llms.values():
        if llm not in study.llms:
            yield "knowledge.llms", f"unknown llm {known(llm, study.llms)}"
    if block.captions not in study.prompt_names:
        kinds = known(block.captions, study.prompt_names)
        yield "knowledge.captions", f"no prompt embeds captions of kind {kinds}"
    else:
        facets = study.prompt_of(block.captions).facets
        for facet in block.asks_for:
            if facet not in facets:
                yield "knowledge.asks_for", f"facet not embedded: {known(facet, facets)}"
    for facet, attribute in block.asks_for.items():
        if attribute not in block.attributes:
            listed = known(attribute, block.attributes)
            yield f"knowledge.asks_for.{facet}", f"unknown attribute {listed}"
    if block.dataset not in study.datasets:
        yield "knowledge.dataset", f"unknown dataset {known(block.dataset, study.datasets)}"
        return
    source = study.datasets[block.dataset].source
    has = getattr(module(source), "ATTRIBUTES", ())
    if not has:
        yield "knowledge.dataset", f"source {source!r} does not know attributes of its images"
    for attribute in block.attributes if has else ():
        if attribute not in has:
            yield "knowledge.attributes", f"unknown attribute {known(attribute, has)}"


def missing_files(study: Study, root: Path) -> Iterator[str]:
    """A line for each file or folder that the study names and that does not exist.

    Args:
        study: the study.
        root: folder of the checkout, to which its files are relative.
    """
    tables = {f"tables.{name}": table.reported for name, table in study.tables.items()}
    tables |= {f"appendix.{name}": table.reported for name, table in study.appendix.items()}
    for path, reported in tables.items():
        if reported is not None and not (root / reported.file).is_file():
            yield f"{path}.reported.file: no such file: {reported.file!r}"
    for name, llm in study.llms.items():
        checkpoint = llm.checkpoint
        if isinstance(checkpoint, FolderCheckpoint) and not Path(checkpoint.path).is_dir():
            yield f"llms.{name}.checkpoint.path: no such folder: {checkpoint.path!r}"


def missing_numbers(study: Study, root: Path) -> Iterator[str]:
    """A line for each number that a table with a tolerance should be checked against, but lacks.

    Args:
        study: the study.
        root: folder of the checkout.
    """
    for name, table in study.tables.items():
        if table.tolerance is None or table.reported is None:
            continue
        with (root / table.reported.file).open(newline="") as file:
            printed = list(csv.DictReader(file))
        for i, row in enumerate(table.rows):
            match = {**table.reported.match, **(row.reported or {})}
            own = [p for p in printed if all(p.get(k) == str(v) for k, v in match.items())]
            there = [f"{p['benchmark']} {p['metric']}" for p in own if p["value"]]
            where = f"tables.{name}.rows.{i}.reported: {table.reported.file!r} has no"
            if not own:
                yield f"{where} rows with {match}"
            for column in table.columns if own else ():
                wanted = f"{column.printed.benchmark} {column.printed.metric}"
                if wanted not in there:
                    yield f"{where} number for {known(wanted, there)}"


def markup(path: str, value: Any) -> Iterator[str]:
    """A line for each text that could run as a script in Snakemake's report, which escapes none.

    Args:
        path: dotted path of the value; "" for the whole study.
        value: any part of a study, as parsed from YAML.
    """
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from markup(f"{path}.{key}" if path else str(key), below)
    elif isinstance(value, list):
        for place, below in enumerate(value):
            yield from markup(f"{path}.{place}", below)
    elif isinstance(value, str) and MARKUP.search(value):
        yield f"{path}: {value!r}: contains HTML that Snakemake's report would run or hide"
