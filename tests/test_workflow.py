"""The workflow through its command line, on the tiny study and on one with every kind of job."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import yaml
from PIL import Image

from flame.study.load import load_file
from flame.study.schema.runs import FlameRun
from flame.study.study import Study
from tests.workflow import (
    ROOT,
    TINY,
    WHOLE,
    alone,
    changed,
    command,
    content,
    matching,
    named,
    planned,
    snakemake,
)

RUNS = [f"flame-{prompts}" for prompts in (1, 3, 5, 7, 9)]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(TINY, ROOT)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """All files that the tiny study makes."""
    return planned(tmp_path_factory.mktemp("empty"), TINY)


# The way of the data.


def test_the_table_has_the_papers_rows_with_its_numbers_beside_ours(finished):
    table = pl.read_csv(finished / "results/table6.csv", infer_schema=False)
    assert table["prompts"].to_list() == ["1", "3", "5", "7", "9"]
    seven = table.row(by_predicate=pl.col("prompts") == "7", named=True)
    assert seven["ShareGPT4V-val i2t_r@1 paper"] == "85.6"
    assert seven["average of 10 downstream sets top1 paper"] == "40.3"
    assert all(0 <= float(value) <= 100 for row in table.iter_rows() for value in row)
    assert "**7**" in (finished / "results/table6.md").read_text()


def test_every_job_leaves_its_outputs_and_its_log(finished, everything):
    said = (finished / "said.txt").read_text()
    assert named("output", said) == everything
    assert not [file for file in everything | named("log", said) if not (finished / file).exists()]
    assert not list(finished.glob("results/**/*.partial"))
    for run in RUNS:
        files = {path.name for path in (finished / "results/train" / run).iterdir()}
        assert files >= {"model.safetensors", "run.json", "log.jsonl", "loss.png"}


def test_long_jobs_show_a_bar(finished):
    logs = [*finished.glob("logs/embed/**/*.log"), *finished.glob("logs/train/*.log")]
    assert len(logs) == 7 + len(RUNS)
    for log in logs:
        assert re.search(r"100%\|.*\d (captions|images)/s", log.read_text()), log


@pytest.fixture(scope="module")
def report(finished, once) -> str:
    """Snakemake's report of a study that includes the tiny one."""

    def run(folder: Path) -> None:
        study = folder / "including.yaml"
        study.write_text(yaml.safe_dump({"include": ["tests/config/tiny.yaml"]}))
        with alone(finished):
            done = snakemake(finished, study, "--report", str(folder / "report.html"))
        assert done.returncode == 0, done.stdout

    return (once("report", run) / "report.html").read_text()


def test_the_report_speaks_of_what_a_study_includes(report):
    assert "Table 6. Number of prompts" in report
    assert "7 data sets" in report


def test_the_report_can_draw_every_run_time(report):
    # A run time of 0 would empty the plot, whose scale is logarithmic.
    rules = re.findall(r'"rule": "(\w+)", "runtime": [0-9.e+-]+', report)
    times = [float(time) for time in re.findall(r'"runtime": ([0-9.e+-]+)', report)]
    assert len(times) == len(rules) > 30
    assert {"prompt", "embed", "train", "table"} <= set(rules)
    assert min(times) > 0


# What runs anew.


def test_a_second_run_does_nothing(finished):
    with alone(finished):
        again = snakemake(finished, TINY, "--cores", "2")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout


def test_speed_is_no_reason_to_run_anew(finished):
    budgets = ["embed:token_budget=512", "embed_training:token_budget=512"]
    nodes = ["train:mpi=srun", "train:nodes=2", "train:tasks=2", "train:gres=gpu:8"]
    watched = ["train:keep_epochs=3", "train:profile_steps=2"]
    resources = [*budgets, *nodes, *watched, "train:workers=1", "evaluate:batch_size=8"]
    flags = ["--cores", "1", "--set-threads", "embed=2", "--set-resources", *resources]
    assert planned(finished, TINY, *flags) == set()


def test_a_moved_folder_does_not_run_anew(finished, tmp_path):
    moved = tmp_path / "deeper" / "moved"
    moved.parent.mkdir()
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    copy.rename(moved)
    assert planned(moved, TINY) == set()


def test_another_checkout_runs_anew_only_what_it_reports_otherwise(finished, tmp_path):
    """Changed code is no reason to rerun (VERSION is); changed numbers of the paper are."""
    for name in ("src", "workflow", "config"):
        shutil.copytree(ROOT / name, tmp_path / name, copy_function=shutil.copy)
    with (tmp_path / "src/flame/embed.py").open("a") as file:
        file.write("# edited\n")
    assert planned(finished, TINY, root=tmp_path) == set()
    reported = tmp_path / "config/reported/table6.csv"
    reported.write_text(reported.read_text().replace("85.6", "85.7"))
    assert planned(finished, TINY, root=tmp_path) == {"results/table6.csv", "results/table6.md"}


DECOY = 'raise SystemExit("another checkout, which the environment has installed")'


def test_a_checkout_runs_its_own_package_whatever_the_environment_has_installed(tmp_path):
    checkout, other, env = (tmp_path / name for name in ("checkout", "other", "env"))
    for name in ("src", "workflow", "config"):
        shutil.copytree(ROOT / name, checkout / name, copy_function=shutil.copy)
    shutil.copy(ROOT / "environment.yml", checkout)
    program = checkout / "src/flame/download.py"
    main = 'if __name__ == "__main__":'
    program.write_text(program.read_text().replace(main, f"print('this is', __file__)\n{main}"))
    (other / "flame").mkdir(parents=True)
    (other / "flame/__init__.py").write_text(DECOY)
    # An environment with the packages of this one, and another checkout installed editable.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    places = [other, *(path for path in sys.path if path.endswith("site-packages"))]
    (site,) = env.glob("lib/python*/site-packages")
    (site / "__editable__.flame.pth").write_text("".join(f"{place}\n" for place in places))
    python = env / "bin/python"
    installed = subprocess.run([python, "-c", "import flame"], capture_output=True, text=True)
    assert installed.stderr.strip() == DECOY.split('"')[1]

    target = "resources/datasets/tints"
    arguments = command(tmp_path / "run", TINY, "--cores", "1", target)[1:]
    done = subprocess.run([python, *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / target / "manifest.json").is_file()
    (log,) = (tmp_path / "run/logs").rglob("*tints*.log")
    assert f"this is {program}\n" in log.read_text()


TABLE = "results/table6.*"
KNOWN = "results/knowledge*"
TOWERS = ["results/train/*", "results/evaluate/*", TABLE]
VALIDATION = {"benchmarks": ["MSCOCO"]}
COLOR, STORES = "results/prompts/long/color.txt", "results/embed/*/long/*"


@pytest.mark.parametrize(
    ("path", "value", "patterns"),
    [
        ("facets.scene.text", "this picture", ["*/scene.txt", "results/embed/*", KNOWN, *TOWERS]),
        ("llms.random-llama.final_norm", False, ["results/embed/*", KNOWN, *TOWERS]),
        ("embedding.positions", "running", ["results/embed/*", KNOWN, *TOWERS]),
        (
            "llms.random-llama.checkpoint.seed",
            1,
            ["resources/llms/*", "results/embed/*", KNOWN, *TOWERS],
        ),
        (
            "datasets.scenes.options.images",
            97,
            ["resources/datasets/scenes", "results/embed/*/scenes/*", KNOWN, *TOWERS],
        ),
        (
            "datasets.scenes-long.options.images",
            25,
            [
                "resources/datasets/scenes-long",
                "results/embed/*/benchmarks/long/*",
                "results/evaluate/*",
                TABLE,
            ],
        ),
        ("recipes.tiny.lr", 2e-3, TOWERS),
        ("runs.flame-3.seeds", [1], ["*/flame-3", "*/flame-3/*", TABLE]),
        ("runs.flame-7.validation.every", 2, []),
        ("datasets.animals.options.images", 44, ["*/animals", "*/class/*", *TOWERS[1:]]),
        ("runs.flame-3.validation", VALIDATION, ["*/flame-3", "*/flame-3/*", TABLE]),
        ("bootstrap.seed", 1, ["results/evaluate/*", KNOWN, TABLE]),
        ("tables.table6.title", "Table 6", [TABLE]),
    ],
)
def test_a_change_runs_exactly_what_depends_on_it(
    finished, everything, tmp_path, path, value, patterns
):
    study = changed(tmp_path / "study.yaml", (path, value))
    assert planned(finished, study) == matching(everything, patterns)


def test_a_changed_facet_text_runs_exactly_the_runs_with_that_facet(
    finished, everything, study, tmp_path
):
    using = [run for run in RUNS if "color" in study.targets(run)["long"]]
    assert using
    assert set(using) < set(RUNS)
    towers = [f"results/{what}" for run in using for what in (f"train/{run}", f"evaluate/{run}/*")]
    edited = changed(tmp_path / "study.yaml", ("facets.color.text", "the colors of this image"))
    assert planned(finished, edited) == matching(everything, [COLOR, STORES, KNOWN, *towers, TABLE])

    # The change is not lost if a run is interrupted between two stores.
    folder = tmp_path / "interrupted"
    shutil.copytree(finished, folder)
    one = "results/embed/random-llama/scenes/long/0.zarr"
    assert snakemake(folder, edited, "--cores", "1", "--", COLOR).returncode == 0
    assert snakemake(folder, edited, "--cores", "1", "--touch", "--", one).returncode == 0
    left = matching(everything, [STORES, KNOWN, *towers, TABLE]) - {one}
    assert planned(folder, edited) == left


@pytest.mark.parametrize(
    ("path", "value", "patterns"),
    [
        ("recipes.tiny.lr", 2e-3, TOWERS),
        ("bootstrap.seed", 1, ["results/train/flame-[59]", "results/evaluate/*", TABLE]),
    ],
)
def test_a_second_change_is_not_lost_behind_a_facet(
    finished, everything, tmp_path, path, value, patterns
):
    """Snakemake may skip the other reasons of a job downstream of one that reruns."""
    facet = ("facets.color.text", "the colors of this image")
    edited = changed(tmp_path / "study.yaml", facet, (path, value))
    assert planned(finished, edited) == matching(everything, [COLOR, STORES, KNOWN, *patterns])


def test_every_setting_is_recorded(finished):
    """Snakemake drops parameters that are not builtins, and then overlooks their changes."""
    tracked = {
        "download_dataset": 5,  # source, options, seed, max_skipped, version
        "download_llm": 3,  # checkpoint, reset, version
        "prompt": 1,  # text
        "embed": 1,  # settings
        "embed_training": 1,  # settings
        "train": 2,  # settings, origin
        "evaluate": 2,  # settings, origin
        "table": 2,  # settings, numbers
        "knowledge": 1,  # settings
        "knowledge_table": 1,  # settings
        "variance": 1,  # settings
        "figure": 1,  # settings
    }
    records = [
        json.loads(path.read_text())
        for path in (finished / ".snakemake/metadata").rglob("*")
        if path.is_file()
    ]
    assert {record["rule"] for record in records} == set(tracked)
    for record in records:
        assert len(record["params"]) == tracked[record["rule"]], record


# Interruptions.


def test_a_killed_run_goes_on_to_the_same_bytes(finished, tmp_path):
    """`kill -9` of Snakemake and all its jobs in the middle of embedding, as in a power cut."""
    whole = yaml.safe_load(TINY.read_text())
    row, run = whole["tables"]["table6"]["rows"][3], whole["runs"]["flame-7"]
    seven = changed(
        tmp_path / "seven.yaml", ("runs", {"flame-7": run}), ("tables.table6.rows", [row])
    )
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    shutil.copytree(finished, undisturbed)
    assert snakemake(undisturbed, seven, "--cores", "2").returncode == 0
    shutil.copytree(undisturbed, folder)
    stores = "results/embed/random-llama/scenes/long"
    for made in (stores, "results/train", "results/evaluate"):
        shutil.rmtree(folder / made)
    for table in folder.glob("results/table6.*"):
        table.unlink()

    lease = folder / stores / "0.zarr.partial/lease.lock"
    process = subprocess.Popen(
        command(folder, seven, "--cores", "2"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (lease.exists() and lease.stat().st_size):
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert lease.exists()

    refused = snakemake(folder, seven, "--cores", "2")
    assert refused.returncode != 0
    assert "It can be removed with the --unlock argument" in refused.stdout
    assert snakemake(folder, seven, "--unlock").returncode == 0
    resumed = snakemake(folder, seven, "--cores", "2")
    assert resumed.returncode == 0, resumed.stdout
    assert (
        "was left by process" in (folder / "logs/embed/random-llama/scenes/long/0.log").read_text()
    )
    assert content(folder / "results/embed") == content(undisturbed / "results/embed")
    for made in ("train/flame-7/model.safetensors", "table6.csv", "table6.md"):
        both = [(where / "results" / made).read_bytes() for where in (folder, undisturbed)]
        assert both[0] == both[1], made


# Every kind of run, benchmark, table and figure.


def test_every_table_and_figure_is_made(whole):
    study = load_file(WHOLE, ROOT)
    for name in [*study.tables, *study.appendix, "claims", "variance"]:
        assert pl.read_csv(whole / f"results/{name}.csv", infer_schema=False).height
        assert (whole / f"results/{name}.md").read_text().startswith(("**", "# "))
    for name in study.figures:
        with Image.open(whole / f"results/{name}.png") as picture:
            assert min(picture.size) > 300
        assert (whole / f"results/{name}.pdf").read_bytes().startswith(b"%PDF")


def test_several_seeds_give_mean_and_deviation(whole):
    table = pl.read_csv(whole / "results/table1.csv", infer_schema=False)
    column = next(name for name in table.columns if name.endswith("(for ShareGPT4V-val) i2t_r@1"))
    measured = dict(zip(table["method and training set"], table[column], strict=True))
    rates = []
    for training in ("clip", "clip.seed1"):
        result = json.loads((whole / f"results/evaluate/{training}/benchmarks.json").read_text())
        record = next(r for r in result["records"] if r["benchmark"] == "ShareGPT4V-val")
        rates.append(record["metrics"]["i2t_r@1"]["value"])
    assert float(measured["CLIP, scenes (for CC3M)"]) == pytest.approx(sum(rates) / 2, abs=0.051)
    assert measured["CLIP, WIT-400M"] in (None, "")


def test_a_second_whole_run_does_nothing(whole):
    assert planned(whole, WHOLE) == set()


def test_a_changed_baseline_runs_what_stands_on_it(whole, tmp_path):
    values = yaml.safe_load(WHOLE.read_text())
    values["text_towers"]["transformer"]["layers"] = 2
    edited = tmp_path / "edited.yaml"
    edited.write_text(yaml.safe_dump(values, sort_keys=False))
    made = planned(whole, edited)
    trained = {name.split("/")[2] for name in made if name.startswith("results/train/")}
    assert trained == {"clip", "clip.seed1", "long-clip"}
    assert not [name for name in made if name.startswith(("results/embed", "results/fewshot"))]
    assert {"results/table1.csv", "results/claims.csv", "results/figure_d2.png"} <= made
    assert not made & {"results/table_c5.csv", "results/figure3.png", "results/figure_c1.png"}


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ([("sede", 0)], ["unknown key 'sede' (did you mean 'seed'?); known: study, seed, "]),
        (
            [("runs.flame-1.llm", "random-lama")],
            ["runs.flame-1.llm: unknown llm 'random-lama' (did you mean 'random-llama'?); known: "],
        ),
        (
            [("runs.flame-1.targets.short", ["color"])],
            ["runs.flame-1.targets.short: facet not embedded by prompt 'short': 'color'; known: "],
        ),
        (
            [("recipes.tiny.batch_size", -32), ("recipes.tiny.lr", "fast")],
            ["recipes.tiny.batch_size: input should be greater than 0", "recipes.tiny.lr: input"],
        ),
        (
            [("tables.table6.reported.file", "config/reported/table66.csv")],
            ["tables.table6.reported.file: no such file: 'config/reported/table66.csv'"],
        ),
        ([("datasets.tints.source", "scene")], ["datasets.tints: unknown data set 'scene'"]),
        (
            [("datasets.tints.options.image", 40)],
            ["datasets.tints: unknown option 'image' (did you mean 'images'?); known: "],
        ),
        (
            [("backbones.resnet.timm", "resnet10")],
            ["backbones.resnet.timm: unknown timm model 'resnet10'; the nearest known: "],
        ),
        (
            [("tables.table6.rows.0.run", "flame-2"), ("benchmarks.DTD.task", "zero-shot")],
            ["benchmarks.DTD.task: unknown task 'zero-shot'", "tables.table6.rows.0.run: unknown"],
        ),
        (
            [("prompts.short.template", "In one word: {caption}")],
            ["prompts.short: template: needs '{caption}' once and, after it, ' {facet}' once"],
        ),
        ([("runs.flame-9.targets.long", 10)], ["runs.flame-9.targets.long: 10 facets wanted"]),
        ([("backbones", None)], ["backbones: field required"]),
    ],
    ids=lambda value: value[0][0] if isinstance(value[0], tuple) else "",
)
def test_a_bad_study_is_told_in_one_line_a_mistake(tmp_path, changes, lines):
    bad = changed(tmp_path / "bad.yaml", *changes)
    folder = tmp_path / "empty"
    folder.mkdir()
    done = snakemake(folder, bad, "--cores", "1", "results/table6.csv")
    assert done.returncode != 0
    profile, *mistakes, advice = done.stdout.splitlines()
    assert profile.startswith("Using workflow specific profile")
    assert advice == "Nothing was run; config/README.md explains every key."
    assert len(mistakes) == len(lines)
    for mistake, line in zip(mistakes, lines, strict=True):
        assert mistake.startswith(f"{bad}: {line}")
    assert {path.name for path in folder.iterdir()} <= {".snakemake"}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["results/table66.csv"],
            "unknown table 'table66' (did you mean 'table6'?); known: ",
        ),
        (["results/sanity.md"], "unknown table 'sanity'; known: table6"),
        (["results/train/flame-2"], "unknown run 'flame-2' (did you mean 'flame-"),
        (
            ["results/embed/random-llama/scenes/longer/0.zarr"],
            "no run, benchmark or figure of the study uses a store 'scenes/longer/0.zarr'",
        ),
        (
            ["results/evaluate/flame-7/scenes.json"],
            "no benchmark of the study asks of bundle 'scenes'",
        ),
        (["--config", "sede=1"], f"{TINY}, --config: unknown key 'sede' (did you mean 'seed'?)"),
        (["--configfile", "no.yaml"], "No such file or directory: 'no.yaml'"),
    ],
)
def test_a_bad_command_line_is_told_and_runs_nothing(tmp_path, flags, line):
    done = snakemake(tmp_path, None if "--configfile" in flags else TINY, "--cores", "1", *flags)
    assert done.returncode != 0
    assert line in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {".snakemake"}


# The workflow as a whole.


def test_the_default_is_the_demo_study(tmp_path):
    study = load_file(ROOT / "config/config.yaml", ROOT)
    before = os.times()
    done = snakemake(tmp_path, None, "--dry-run", fresh=True)
    after = os.times()  # CPU seconds, because the machine may be busy
    assert after.children_user - before.children_user < 10
    assert done.returncode == 0, done.stdout
    counts = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.M))
    results = {r for name in study.tables for r in study.table_comparison(name)[1]}
    results |= {r for name in study.figures for r in study.figure_results(name)}
    results |= set(study.claims_comparison(study.claims.values())[1])
    evaluated = [r.split("/")[1:] for r in results if r.startswith("evaluate/")]
    towers = {run for run, _ in evaluated}
    flame = {name: run for name, run in study.runs.items() if isinstance(run, FlameRun)}
    trained = {(r.llm, study.bundle(r.dataset), k) for r in flame.values() for k in r.targets}
    asked = {
        (flame[run].llm, bundle, kind)
        for run, bundle in evaluated
        if run in flame
        for q in study.questions(run, bundle)
        for kind in (q.captions, q.negatives)
        if kind
    }
    expected = {
        "download_dataset": len(study.datasets),
        "download_llm": len(study.llms),
        "prompt": sum(len(prompt.facets) for prompt in study.prompts.values()),
        "embed": sum(study.parts(bundle, kind) for _, bundle, kind in asked),
        "embed_training": sum(study.parts(bundle, kind) for _, bundle, kind in trained),
        "train": len(towers),
        "evaluate": len(evaluated),
        "fewshot": len(results) - len(evaluated),
        "overhead": 1,
        "table": len(study.tables),
        "appendix": len(study.appendix),
        "figure": len(study.figures),
        "claims": 1,
        "variance": 1,
        "knowledge": len(study.knowledge.llms),
        "knowledge_table": 1,
        "all": 1,
    }
    expected["total"] = sum(expected.values())
    # CLIP can be trained with every backbone on both training sets, even if no table needs it.
    assert set(study.runs) - towers == {"large-clip-small"}
    assert counts == {rule: str(count) for rule, count in expected.items()}


def test_the_workflow_is_in_good_form(tmp_path):
    lint = snakemake(tmp_path, None, "--lint")
    assert lint.returncode == 0, lint.stdout
    form = subprocess.run(
        [Path(sys.executable).with_name("snakefmt"), "--check", "workflow"], cwd=ROOT
    )
    assert form.returncode == 0


TORCHRUN = "python -m torch.distributed.run --nproc-per-node"
MEETING = "--rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$(hostname):$((10000 + SLURM_JOB_ID % 20000))"


@pytest.mark.parametrize(
    ("resources", "started"),
    [
        ("gpu=1", "python"),
        ("gpu=8", f"{TORCHRUN}=8 --standalone"),
        ("gres=gpu:8", f"{TORCHRUN}=8 --standalone"),
        (
            "mpi=srun nodes=4 tasks=4 gres=gpu:h100:8 cpus_per_task=64",
            "srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --cpus-per-task=64 --kill-on-bad-exit=1"
            f" env {TORCHRUN}=8 --nnodes=4 --rdzv-backend=c10d {MEETING}",
        ),
        (
            "mpi=srun nodes=2 tasks=2 gpu=4",
            "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1"
            f" env {TORCHRUN}=2 --nnodes=2 --rdzv-backend=c10d {MEETING}",
        ),
    ],
)
def test_training_is_started_in_a_process_for_every_gpu(tmp_path, resources, started):
    flags = ["--set-resources", *(f"train:{resource}" for resource in resources.split())]
    done = snakemake(tmp_path, TINY, "-n", "-p", *flags, "--", "results/train/flame-1")
    command = re.search(r"^Shell command: (.* -m) flame.train ", done.stdout, re.M)[1]
    plain = re.sub(r"PYTHONPATH=\S+ \S+/python\S*", "python", command)
    assert plain == f"{started} -m"


@pytest.mark.parametrize(
    ("resources", "line"),
    [
        ("nodes=2", "nodes=2 needs mpi=srun, which starts the others, and tasks=2"),
        ("mpi=srun nodes=2 gpu=3", "gpu=3 cannot be spread evenly over nodes=2"),
    ],
)
def test_processes_that_nothing_would_start_are_refused(tmp_path, resources, line):
    flags = ["--set-resources", *(f"train:{resource}" for resource in resources.split())]
    done = snakemake(tmp_path, TINY, "-n", *flags, "--", "results/train/flame-1")
    assert done.returncode != 0
    assert line in done.stdout


def test_every_job_gets_more_memory_and_time_with_a_retry(tmp_path):
    asked = []
    for attempt in (1, 3):
        done = snakemake(tmp_path, WHOLE, "-n", "--attempt", str(attempt))
        jobs = re.findall(r"^rule (\w+):(?s:.*?)^    resources: (.+)$", done.stdout, re.M)
        asked.append(
            {
                (rule, kind, int(amount) // attempt)
                for rule, resources in jobs
                for kind, amount in re.findall(r"\b(mem_mb|runtime)=(\d+)", resources)
                if rule not in ("all", "prompt")  # which no scheduler gets to see
            }
        )
    assert asked[0] == asked[1]
    rules = {rule for rule, *_ in asked[0]}
    assert rules >= {"download_dataset", "download_llm", "embed", "train", "evaluate", "table"}
    assert {(rule, kind) for rule, kind, _ in asked[0]} == {
        (rule, kind) for rule in rules for kind in ("mem_mb", "runtime")
    }


def test_rules_leave_the_machine_to_profiles():
    rules = {
        rule.split(":")[0]: rule
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for rule in re.split(r"^rule ", path.read_text(), flags=re.M)[1:]
    }
    assert set(rules) >= {"download_dataset", "download_llm", "embed", "train", "evaluate", "table"}
    for name, rule in rules.items():
        for directive in ("log", "conda", "shell"):
            assert f"\n    {directive}:\n" in rule, f"{name} has no {directive}:"
        assert not re.search(r"retries|slurm|partition|nodes|\bmpi\b", rule), name
