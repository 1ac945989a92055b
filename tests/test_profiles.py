"""The profiles for machines with GPUs: every rule is thought of, and gets what they say."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yte

from tests.workflow import ROOT, TINY, snakemake

PAPER = ROOT / "config/paper.yaml"
PROFILES = ["one-gpu", "one-node", "four-nodes"]
ON_GPU = {
    "caption",
    "caption_by_vllm",
    "embed",
    "embed_training",
    "train",
    "evaluate",
    "fewshot",
    "overhead",
}
# Rules of what the paper has nothing like, so that its study has no job of them.
OURS = {"knowledge", "knowledge_table"}
Asked = dict[str, dict[str, str]]


def rules() -> set[str]:
    """Every rule that makes something."""
    sources = [path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")]
    found = [re.findall(r"^(?:rule|use rule \w+ as) (\w+)", text, re.M) for text in sources]
    return {name for names in found for name in names}


def profile(name: str) -> dict[str, Any]:
    with (ROOT / f"workflow/profiles/{name}/config.yaml").open() as file:
        return yte.process_yaml(file, require_use_yte=True)


def plan(folder: Path, study: Path, *flags: str) -> tuple[Asked, dict[str, str]]:
    """A dry run: rule -> resources and threads of its first job, most memory; its command."""
    done = snakemake(folder, study, "-n", "-p", *flags)
    assert done.returncode == 0, done.stdout
    asked: Asked = {}
    commands: dict[str, str] = {}
    for block in re.split(r"^ *\[.*\]\n", done.stdout, flags=re.M):
        if head := re.match(r" *(?:local)?rule (\w+):", block):
            resources = re.search(r"^ +resources: (.*)$", block, re.M)[1]
            threads = re.search(r"^ +threads: (\d+)$", block, re.M)
            one = dict(part.split("=", 1) for part in resources.split(", "))
            first = asked.setdefault(head[1], one | {"threads": threads[1] if threads else "1"})
            if "<TBD>" not in one.get("mem_mb", "<TBD>"):  # those of `all` and `prompt`
                first["mem_mb"] = max(first["mem_mb"], one["mem_mb"], key=int)
            if command := re.search(r"^ *Shell command: (.*)$", block, re.M):
                commands.setdefault(head[1], command[1])
    return asked, commands


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, tuple[Asked, dict[str, str]]]:
    """Dry runs of the paper's study by profile; no table asks for an export."""
    folder = tmp_path_factory.mktemp("empty")
    # Without --cores, a dry run on a cluster would show one thread a job.
    cores = {name: ["--cores", "96"] if name != "one-gpu" else [] for name in PROFILES}
    return {
        name: plan(
            folder,
            PAPER,
            *cores[name],
            "--workflow-profile",
            name,
            "--",
            "all",
            "results/export/flame-7",
        )
        for name in PROFILES
    }


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_every_rule(planned, name):
    assert set(profile(name)["set-threads"]) == rules()
    assert set(profile(name)["set-resources"]) == ON_GPU
    assert set(planned[name][0]) - {"all"} == rules() - OURS


@pytest.mark.parametrize("name", PROFILES)
def test_rules_get_what_the_profile_says(planned, name):
    given, (asked, _) = profile(name), planned[name]
    for rule in rules() - OURS:
        wanted = {key: str(value) for key, value in given["set-resources"].get(rule, {}).items()}
        wanted.pop("runtime", None)  # an expression
        threads = str(given["set-threads"][rule])
        if name == "one-gpu":  # this machine may have one core
            threads = str(min(int(threads), len(os.sched_getaffinity(0))))
        assert asked[rule].items() >= wanted.items(), rule
        assert asked[rule]["threads"] == threads, rule
        assert ("gpu" in asked[rule] or "gres" in asked[rule]) == (rule in ON_GPU), rule


@pytest.mark.parametrize("name", ["one-node", "four-nodes"])
def test_memory_follows_the_profile(planned, name):
    nemo = 24_500  # MB of its weights in bfloat16
    asked, _ = planned[name]
    for rule, needed in {
        "caption_by_vllm": 17_000 + 8_000,  # the model, and two caches of vLLM
        "captions": 17_000,  # the text of YFCC15M
        "embed_training": nemo,
        "fewshot": nemo,
        "overhead": nemo,
        "train": 8 * 11 * 300,  # workers
    }.items():
        assert int(asked[rule]["mem_mb"]) > needed, rule


@pytest.mark.parametrize("name", ["one-node", "four-nodes"])
def test_placeholders_are_in_one_place(planned, name):
    text = (ROOT / f"workflow/profiles/{name}/config.yaml").read_text()
    for word in ('"lab"', '"cpu"', '"gpu"', "12 "):
        assert text.count(word) == 1, word
    partitions = {rule: r.get("slurm_partition") for rule, r in planned[name][0].items()}
    assert partitions == {rule: "gpu" if rule in ON_GPU else "cpu" for rule in partitions}
    assert {r.get("slurm_account") for r in planned[name][0].values()} == {"lab"}


TORCHRUN = r"-m torch.distributed.run --nproc-per-node=8"


@pytest.mark.parametrize(
    ("name", "started"),
    [
        ("one-gpu", r"\S+/python\S* -m flame.train"),
        ("one-node", rf"\S+/python\S* {TORCHRUN} --standalone -m flame.train"),
        (
            "four-nodes",
            rf"srun --nodes=4 --ntasks=4 .*--cpus-per-task=96 .*{TORCHRUN} --nnodes=4 ",
        ),
    ],
)
def test_a_training_takes_all_gpus_of_a_profile(planned, name, started):
    command = planned[name][1]["train"]
    assert re.match(rf"(PYTHONPATH=\S+ )?{started}", command)
    assert int(re.search(r"--workers (\d+)", command)[1]) >= 1


def test_one_gpu_is_given_to_one_job_at_a_time():
    given = profile("one-gpu")
    assert given["resources"]["gpu"] == 1
    assert {rule["gpu"] for rule in given["set-resources"].values()} == {1}


@pytest.mark.parametrize("name", PROFILES)
def test_the_cheapest_run_is_planned_by_every_profile(tmp_path, name):
    asked, commands = plan(tmp_path, ROOT / "config/cc3m.yaml", "--workflow-profile", name)
    assert rules() > set(asked) - {"all"} > {"embed_training", "train", "evaluate", "table"}
    assert "caption_by_vllm" not in asked
    assert "flame.train" in commands["train"]


ONLINE = ["--until", "download_dataset", "download_llm", "download_tower"]


def test_what_needs_the_internet_can_run_alone(tmp_path):
    """Before the rest, by the default profile, as docs/cluster.md says."""
    asked, _ = plan(tmp_path, PAPER, *ONLINE)
    assert set(asked) == {"download_dataset", "download_llm", "download_tower"}
    assert " ".join(ONLINE) in (ROOT / "docs/cluster.md").read_text()
    published = "results/caption/published-cc3m/cc3m-published/0.parquet"
    asked, _ = plan(tmp_path, PAPER, "--", published)
    assert set(asked) == {"download_dataset", "caption"}


def test_the_command_line_replaces_an_option_of_a_profile_as_a_whole(tmp_path):
    """As docs/cluster.md warns."""
    flags = ["--workflow-profile", "one-node", "--set-resources", "train:workers=3"]
    asked, _ = plan(tmp_path, TINY, *flags)
    assert asked["train"]["workers"] == "3"
    assert "gres" not in asked["train"]
    assert "gpu" not in asked["embed"]
