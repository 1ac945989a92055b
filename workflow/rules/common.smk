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

from flame.runtime import failures
from flame.runtime.checksums import sha256
from flame.study.load import StudyError, load
from flame.study.settings import VERSION


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
# With all that it includes: the captions of the report speak of it.
config.update(study.model_dump(mode="json"))

HOUR = 60  # minutes, in which `runtime` counts


def growing(amount):
    """Memory or time of a job, once more with each retry, for too little of it may end a job."""

    def resource(wildcards, attempt):
        return amount * attempt

    return resource


def tell_failures(log):
    """Once more, at the end of a run on a cluster: what failed, and why."""
    sys.stderr.writelines(failures.report(Path(path).read_text()) for path in log)


def one_of(names):
    """Regular expression of some names; of nothing if there are none."""
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


wildcard_constraints:
    dataset=r"[^/]+",
    llm=r"[^/]+",
    bundle=r"[^/]+",
    kind=r"[^/]+",
    part=r"\d+",
    captioner=r"[^/]+",
    run=r"[^/]+",
    benchmark=r"[^/]+",
    figure=r"[^/]+",
    appendix=one_of(study.appendix),
    table=rf"(?!(?:claims|{one_of(study.appendix)})\.)[^/]+",


def program(wildcards, output):
    """How a stage is called: by conda's Python, or by the one that runs Snakemake.

    It takes `output`, which makes it no reason to run a job anew on another machine or checkout.
    """
    by_conda = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    interpreter = "python" if by_conda else sys.executable
    return f"PYTHONPATH={SRC} {interpreter} -m" if SRC.is_dir() else f"{interpreter} -m"


def trainer(wildcards, output, resources, threads):
    """How training is called: by torchrun for several GPUs, and that by srun for several nodes.

    As in `program`, where it runs is no reason to run anew. The first node, on which this is read
    by the shell, is where the processes meet; ports below 32768 are not given away by Linux.
    """
    nodes, gpus = resources.get("nodes", 1), gpus_of_node(resources)
    if nodes == gpus == 1:
        return program(wildcards, output)
    torchrun = f"{program(wildcards, output)} torch.distributed.run --nproc-per-node={gpus}"
    if nodes == 1:
        return f"{torchrun} --standalone -m"
    if "mpi" not in resources.keys():
        raise WorkflowError(
            f"nodes={nodes} needs mpi=srun, which starts the others, and tasks={nodes}"
        )
    cores = resources.get("cpus_per_task", threads)
    return (
        f"{resources.mpi} --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"
        f" --cpus-per-task={cores} --kill-on-bad-exit=1 env {torchrun} --nnodes={nodes}"
        " --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID"
        " --rdzv-endpoint=$(hostname):$((10000 + SLURM_JOB_ID % 20000)) -m"
    )


def gpus_of_node(resources):
    """GPUs that a job has on each of its nodes; 1 where it asks for none and so has a CPU."""
    if "gres" in resources.keys():  # gpu, gpu:8 or gpu:<model>:8
        kind, _, rest = resources.gres.partition(":")
        number = rest.rpartition(":")[2]
        return int(number) if kind == "gpu" and number.isdigit() else 1
    gpus, nodes = resources.get("gpu", 0), resources.get("nodes", 1)
    if gpus % nodes:
        raise WorkflowError(f"gpu={gpus} cannot be spread evenly over nodes={nodes}")
    return max(gpus // nodes, 1)


def all_cores(wildcards):
    """All cores of this machine, so that nothing else runs beside what is timed.

    Where jobs go to other machines there is no such number: 1, or what --set-threads says.
    """
    return workflow.resource_settings.cores or 1


def known_name(kind, name, table):
    """A name that a wildcard took from the command line, or an error with the known ones."""
    if name not in table:
        raise WorkflowError(f"unknown {kind} {name!r}; the study knows: {', '.join(table)}")
    return table[name]


def dataset_source(wildcards):
    return known_name("dataset", wildcards.dataset, study.datasets).source


def dataset_options(wildcards):
    return json.dumps(known_name("dataset", wildcards.dataset, study.datasets).options)


def dataset_memory(wildcards, attempt):
    """MB that a download takes: its index, of 1 kB an image, is made in memory."""
    return (1000 + study.datasets[wildcards.dataset].images // 1000) * attempt


def dataset_minutes(wildcards, attempt):
    """Minutes that a download may take: at least five images a second."""
    return (12 * HOUR + study.datasets[wildcards.dataset].images // 300) * attempt


def llm_checkpoint(wildcards):
    return known_name("llm", wildcards.llm, study.llms).checkpoint.model_dump_json()


def llm_reset(wildcards):
    seed = study.llms[wildcards.llm].reset
    return "" if seed is None else f"--reset {seed}"


def tower_settings(wildcards):
    training(wildcards)
    return study.tower_settings(wildcards.run).model_dump_json()


def tower_folder(wildcards):
    """Folder of a tower, trained here or by others."""
    training(wildcards)
    return (
        f"{'results/train' if study.trained(wildcards.run) else 'resources/towers'}/{wildcards.run}"
    )


def caption_dataset(wildcards):
    known_name("captioner", wildcards.captioner, study.captioners)
    known_name("dataset", wildcards.dataset, study.datasets)
    return f"resources/datasets/{wildcards.dataset}"


def caption_settings(wildcards):
    part = int(wildcards.part)
    return study.caption_settings(wildcards.captioner, wildcards.dataset, part).model_dump_json()


def caption_files(wildcards):
    caption_dataset(wildcards)
    return expand(
        "results/caption/{captioner}/{dataset}/{part}.parquet",
        captioner=wildcards.captioner,
        dataset=wildcards.dataset,
        part=range(study.caption_parts(wildcards.captioner, wildcards.dataset)),
    )


def captions_settings(wildcards):
    return study.captions_settings(wildcards.captioner, wildcards.dataset).model_dump_json()


def captions_folder(dataset, kind):
    """Folder with a data set's captions of a kind: its own, or those of its captioner."""
    captioner = study.captioner_of(dataset, kind)
    return (
        f"results/captions/{captioner}/{dataset}" if captioner else f"resources/datasets/{dataset}"
    )


def captioners_by_vllm():
    """Regular expression of the captioners that need vLLM, and so an environment of their own."""
    return one_of(n for n, captioner in study.captioners.items() if captioner.engine == "vllm")


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
    trained = filter(study.trained, study.trainings)
    return one_of({study.bundle(study.dataset_of(run)) for run in trained})


def embed_datasets(wildcards):
    datasets = study.bundle_datasets(wildcards.bundle, wildcards.kind)
    if not datasets or int(wildcards.part) >= study.parts(wildcards.bundle, wildcards.kind):
        store = f"{wildcards.bundle}/{wildcards.kind}/{wildcards.part}.zarr"
        raise WorkflowError(f"no run, benchmark or figure of the study uses a store {store!r}")
    return [captions_folder(dataset, wildcards.kind) for dataset in datasets]


def embed_prompts(wildcards):
    facets = study.embedded_facets(wildcards.llm, wildcards.bundle, wildcards.kind)
    return prompt_files(wildcards.kind, facets)


def embed_settings(wildcards):
    known_name("llm", wildcards.llm, study.llms)
    return study.embed_settings(
        wildcards.llm, wildcards.bundle, wildcards.kind, int(wildcards.part)
    ).model_dump_json()


def training(wildcards):
    return known_name("run", wildcards.run, study.trainings)[0]


def llm_of(wildcards):
    """LLM of a run; nothing where it trains a text tower of its own."""
    return getattr(training(wildcards), "llm", None)


def train_images(wildcards):
    training(wildcards)
    return f"resources/datasets/{study.dataset_of(wildcards.run)}"


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
    llm = llm_of(wildcards)
    if llm is None:
        return []
    bundle = study.bundle(study.dataset_of(wildcards.run))
    kinds = training(wildcards).targets
    stores = [path for kind in kinds for path in store_files(llm, bundle, kind)]
    params = train_settings(wildcards), train_origin(wildcards)
    return unless_written_anew(stores, f"results/train/{wildcards.run}", *params)


def train_captions(wildcards):
    """Captions that a baseline reads as they are, where they are not the data set's own."""
    dataset = study.dataset_of(wildcards.run)
    kinds = study.baseline_kinds(wildcards.run)
    written = [kind for kind in kinds if study.captioner_of(dataset, kind)]
    return list(dict.fromkeys(captions_folder(dataset, kind) for kind in written))


def train_base(wildcards):
    base = study.base(wildcards.run)
    return f"results/train/{base}" if base else []


def llm_folder(wildcards):
    llm = llm_of(wildcards)
    return f"resources/llms/{llm}" if llm else []


def sources(wildcards, input):
    """Flags of what only some runs have: embeddings, or a run to start from."""
    given = {name: input.get(name) for name in ("stores", "captions", "base")}
    return " ".join(f"--{name} {paths}" for name, paths in given.items() if paths)


def train_origin(wildcards):
    return json.dumps(study.train_origin(wildcards.run))


def train_settings(wildcards):
    return study.train_settings(wildcards.run).model_dump_json()


def questions(wildcards):
    training(wildcards)
    asked = study.questions(wildcards.run, wildcards.bundle)
    if not asked:
        raise WorkflowError(f"no benchmark of the study asks of bundle {wildcards.bundle!r}")
    return asked


def evaluate_datasets(wildcards):
    datasets = {name: None for q in questions(wildcards) for name in (q.dataset, q.train) if name}
    return expand("resources/datasets/{dataset}", dataset=datasets)


def evaluate_stores(wildcards):
    llm = llm_of(wildcards)
    if llm is None:
        return []
    asked = questions(wildcards)
    kinds = {kind: None for q in asked for kind in (q.captions, q.negatives) if kind}
    stores = [path for kind in kinds for path in store_files(llm, wildcards.bundle, kind)]
    output = f"results/evaluate/{wildcards.run}/{wildcards.bundle}.json"
    params = evaluate_settings(wildcards), evaluate_origin(wildcards)
    return unless_written_anew(stores, output, *params)


def evaluate_origin(wildcards):
    return json.dumps(study.evaluate_origin(wildcards.run, wildcards.bundle))


def evaluate_settings(wildcards):
    return study.evaluate_settings(wildcards.run, wildcards.bundle).model_dump_json()


def fewshot_settings(wildcards):
    training(wildcards)
    known_name("benchmark", wildcards.benchmark, study.benchmarks)
    return study.fewshot_settings(wildcards.run, wildcards.benchmark).model_dump_json()


def fewshot_dataset(wildcards):
    benchmark = known_name("benchmark", wildcards.benchmark, study.benchmarks)
    return f"resources/datasets/{benchmark.dataset}"


def fewshot_stores(wildcards):
    """Training embeddings, which say how long the vectors are that the LLM knows."""
    benchmark = known_name("benchmark", wildcards.benchmark, study.benchmarks)
    bundle = study.bundle(study.dataset_of(wildcards.run))
    return store_files(llm_of(wildcards), bundle, benchmark.captions)


def export_metrics(wildcards):
    return result_files(study.export_results(wildcards.run), "json")


def export_settings(wildcards):
    training(wildcards)
    try:
        return study.export_settings(wildcards.run).model_dump_json()
    except ValueError as error:
        raise WorkflowError(str(error)) from error


def overhead_inputs():
    """Inputs of the job that takes times; none in a study without it."""
    if study.overhead is None:
        return {}
    run = study.flame_run(study.overhead.run)
    bundle = study.bundle(run.dataset)
    return {
        "images": f"resources/datasets/{run.dataset}",
        "llm": f"resources/llms/{run.llm}",
        "stores": [path for kind in run.targets for path in store_files(run.llm, bundle, kind)],
    }


def overhead_settings(wildcards):
    return study.overhead_settings().model_dump_json()


def result_files(results, extension):
    return [f"results/{result}.{extension}" for result in results]


def table_metrics(wildcards):
    known_name("table", wildcards.table, study.tables)
    return result_files(study.table_results(wildcards.table), "json")


def table_hits(wildcards):
    return result_files(study.table_results(wildcards.table), "parquet")


def claim_results():
    return study.claim_results(study.claims.values())


def claims_overhead(wildcards):
    return ["results/overhead.json"] if any(claim.ratio for claim in study.claims.values()) else []


def claims_overhead_flag(wildcards, input):
    return f"--overhead {input.overhead}" if input.overhead else ""


def claims_settings(wildcards):
    return study.claims_settings().model_dump_json()


def appendix_reported(wildcards, output):
    return os.path.relpath(ROOT / study.appendix[wildcards.appendix].reported.file)


def appendix_numbers(wildcards):
    return sha256(ROOT / study.appendix[wildcards.appendix].reported.file)


def appendix_settings(wildcards):
    return study.appendix_settings(wildcards.appendix).model_dump_json()


def figure_inputs(wildcards):
    """What a figure is drawn from: results of runs, and what else its kind needs."""
    figure = known_name("figure", wildcards.figure, study.figures)
    results = study.figure_results(wildcards.figure)
    match figure.kind:
        case "mask":
            return [f"resources/llms/{figure.llm}"]
        case "overhead":
            return ["results/overhead.json"]
        case "words":
            dataset = study.benchmarks[figure.benchmark].dataset
            return [*result_files(results, "words.json"), f"resources/datasets/{dataset}"]
        case "examples":
            dataset = study.benchmarks[figure.benchmark].dataset
            return [*result_files(results, "parquet"), f"resources/datasets/{dataset}"]
        case "captions":
            stores = [
                p for place in study.figure_stores(wildcards.figure) for p in store_files(*place)
            ]
            return [*figure_captions(figure), *stores]
    return result_files(results, "json") + result_files(results, "parquet")


def figure_captions(figure):
    """One folder with all captions of each data set that a figure compares."""
    folders = []
    for dataset in figure.datasets.values():
        written = [kind for kind in figure.kinds if study.captioner_of(dataset, kind)]
        # A captioner's folder has the data set's other kinds, too.
        folders.append(captions_folder(dataset, (written or figure.kinds)[0]))
    return folders


def figure_settings(wildcards):
    return study.figure_settings(wildcards.figure).model_dump_json()


def table_reported(wildcards, output):
    """Where the paper's numbers lie; as in `program`, their place is no reason to run anew."""
    return os.path.relpath(ROOT / study.tables[wildcards.table].reported.file)


def table_numbers(wildcards):
    """Digest of the paper's numbers: these are a reason."""
    return sha256(ROOT / study.tables[wildcards.table].reported.file)


def table_settings(wildcards):
    return study.table_settings(wildcards.table).model_dump_json()


def everything():
    """Every table, figure and list of the study."""
    tables = expand("results/{table}.csv", table=[*study.tables, *study.appendix])
    figures = expand("results/{figure}.png", figure=study.figures)
    return tables + figures + (["results/claims.csv"] if study.claims else [])
