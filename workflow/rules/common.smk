"""The study, and functions of wildcards that say what a file depends on."""

import json
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile, ancient
from snakemake.settings.types import DeploymentMethod

ROOT = Path(str(workflow.current_basedir)).parents[1]
SRC = Path(os.path.relpath(ROOT / "src"))
sys.path.insert(0, str(ROOT / "src"))

from flame.config import StudyError, VERSION, load


def checked_study():
    """The study named by --configfile or by the profile; one line per mistake if it has any."""
    origins = [str(path) for path in workflow.configfiles] or ["no --configfile"]
    if workflow.config_settings.config:
        origins.append("--config")
    try:
        return load(config, ", ".join(origins), ROOT)
    except StudyError as error:
        sys.exit(f"{error}\nNothing was run; config/README.md explains every key.")


study = checked_study()


wildcard_constraints:
    dataset=r"[^/]+",
    llm=r"[^/]+",
    bundle=r"[^/]+",
    kind=r"[^/]+",
    part=r"\d+",
    run=r"[^/]+",
    table=r"[^/]+",


def program(wildcards, output):
    """How a stage is called: by conda's Python, or by the one that runs Snakemake.

    It takes `output`, which makes it no reason to run a job anew on another machine or checkout.
    """
    by_conda = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    interpreter = "python" if by_conda else sys.executable
    return f"PYTHONPATH={SRC} {interpreter} -m" if SRC.is_dir() else f"{interpreter} -m"


def known_name(kind, name, table):
    """A name that a wildcard took from the command line, or an error with the known ones."""
    if name not in table:
        raise WorkflowError(f"unknown {kind} {name!r}; the study knows: {', '.join(table)}")
    return table[name]


def dataset_source(wildcards):
    return known_name("dataset", wildcards.dataset, study.datasets).source


def dataset_options(wildcards):
    return json.dumps(known_name("dataset", wildcards.dataset, study.datasets).options)


def llm_checkpoint(wildcards):
    return known_name("llm", wildcards.llm, study.llms).checkpoint.model_dump_json()


def prompt_text(wildcards):
    prompt = known_name("prompt", wildcards.prompt, study.prompts)
    before, after = prompt.prefix
    facet = known_name("facet", wildcards.facet, study.facets)
    return f"{before}{{caption}}{after}{prompt.suffix(facet.text)}"


def prompt_files(kind, facets):
    return expand(
        "results/prompts/{prompt}/{facet}.txt", prompt=study.prompt_name(kind), facet=facets
    )


def store_files(llm, bundle, kind):
    return expand(
        "results/embed/{llm}/{bundle}/{kind}/{part}.zarr",
        llm=llm,
        bundle=bundle,
        kind=kind,
        part=range(study.parts(bundle, kind)),
    )


def training_bundles():
    """Regular expression of the bundles that some run is trained on."""
    bundles = {study.bundle(run.dataset) for run in study.runs.values()}
    return "|".join(map(re.escape, sorted(bundles)))


def embed_datasets(wildcards):
    datasets = study.bundle_datasets(wildcards.bundle, wildcards.kind)
    if not datasets or int(wildcards.part) >= study.parts(wildcards.bundle, wildcards.kind):
        store = f"{wildcards.bundle}/{wildcards.kind}/{wildcards.part}.zarr"
        raise WorkflowError(f"no run or benchmark of the study uses a store {store!r}")
    return expand("resources/datasets/{dataset}", dataset=datasets)


def embed_prompts(wildcards):
    return prompt_files(wildcards.kind, study.prompt_of(wildcards.kind).facets)


def embed_settings(wildcards):
    known_name("llm", wildcards.llm, study.llms)
    return study.embed_settings(
        wildcards.llm, wildcards.bundle, wildcards.kind, int(wildcards.part)
    ).model_dump_json()


def train_images(wildcards):
    return f"resources/datasets/{known_name('run', wildcards.run, study.runs).dataset}"


def unless_written_anew(stores, output, *params):
    """Stores of which only a job that was made from something else asks whether they are new.

    A store holds more facets than a run uses, and is written anew when any of them changes: hence
    `ancient`. But of a job behind an ancient input that is about to be written Snakemake asks no
    other reason either, such as a changed recipe (dag.py, update_needrun: "masked"). So it is said
    only where the job last ran with just these params, which name all that it uses of the stores.
    """
    recorded = workflow.persistence.params(IOFile(output))
    same = Path(output).exists() and recorded == sorted(map(repr, params))
    return [ancient(path) for path in stores] if same else stores


def train_stores(wildcards):
    run = study.runs[wildcards.run]
    bundle = study.bundle(run.dataset)
    stores = [path for kind in run.targets for path in store_files(run.llm, bundle, kind)]
    params = train_settings(wildcards), train_origin(wildcards)
    return unless_written_anew(stores, f"results/train/{wildcards.run}", *params)


def train_llm(wildcards):
    return f"resources/llms/{study.runs[wildcards.run].llm}"


def train_origin(wildcards):
    """What is behind the files of a run, down to the words of its facets."""
    run = study.runs[wildcards.run]
    facets = [
        (kind, name) for kind, names in study.targets(wildcards.run).items() for name in names
    ]
    return json.dumps(study.origin(run.llm, facets, [run.dataset]))


def train_settings(wildcards):
    return study.train_settings(wildcards.run).model_dump_json()


def questions(wildcards):
    known_name("run", wildcards.run, study.runs)
    asked = study.questions(wildcards.run, wildcards.bundle)
    if not asked:
        raise WorkflowError(f"no benchmark of the study asks of bundle {wildcards.bundle!r}")
    return asked


def evaluate_datasets(wildcards):
    datasets = {q.dataset: None for q in questions(wildcards)}
    return expand("resources/datasets/{dataset}", dataset=datasets)


def evaluate_stores(wildcards):
    llm = study.runs[wildcards.run].llm
    kinds = {q.captions: None for q in questions(wildcards)}
    stores = [path for kind in kinds for path in store_files(llm, wildcards.bundle, kind)]
    output = f"results/evaluate/{wildcards.run}/{wildcards.bundle}.json"
    params = evaluate_settings(wildcards), evaluate_origin(wildcards)
    return unless_written_anew(stores, output, *params)


def evaluate_origin(wildcards):
    """What is behind the files of an evaluation: the tower's settings and origin, and its own."""
    asked = questions(wildcards)
    facets = [(q.captions, facet) for q in asked for facet in q.facets]
    datasets = dict.fromkeys(q.dataset for q in asked)
    own = study.origin(study.runs[wildcards.run].llm, facets, datasets)
    return json.dumps([train_settings(wildcards), train_origin(wildcards), own])


def evaluate_settings(wildcards):
    return study.evaluate_settings(wildcards.run, wildcards.bundle).model_dump_json()


def table_metrics(wildcards):
    table = known_name("table", wildcards.table, study.tables)
    bundles = {study.bundle(study.benchmarks[b].dataset): None for b in table.benchmarks}
    return expand(
        "results/evaluate/{run}/{bundle}.json",
        run={row.run: None for row in table.rows},
        bundle=bundles,
    )


def table_reported(wildcards, output):
    """Where the paper's numbers lie; as in `program`, their place is no reason to run anew."""
    return os.path.relpath(ROOT / study.tables[wildcards.table].reported.file)


def table_numbers(wildcards):
    """The paper's numbers themselves: these are a reason."""
    return (ROOT / study.tables[wildcards.table].reported.file).read_text()


def table_settings(wildcards):
    return study.table_settings(wildcards.table).model_dump_json()


def all_tables():
    return expand("results/{table}.csv", table=study.tables)
