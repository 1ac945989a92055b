"""The plan of the paper's own study, and of each part of it, before anything runs."""

import re
from pathlib import Path

import pytest

from flame.report.extent import Extent
from flame.study.load import load_file
from flame.study.study import Study
from tests.workflow import snakemake

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "config/paper.yaml"


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(PAPER, ROOT)


def jobs(folder: Path, *flags: str) -> dict[str, int]:
    """Number of jobs per rule in a dry run."""
    done = snakemake(folder, PAPER, "--quiet", "rules", "--dry-run", *flags)
    assert done.returncode == 0, done.stdout
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.M)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return jobs(tmp_path_factory.mktemp("paper"))


def test_the_plan_has_every_job_of_the_paper(study, plan):
    assert plan["train"] == sum(study.trained(name) for name in study.trainings)
    assert plan["download_tower"] == sum(not study.trained(name) for name in study.trainings)
    assert plan["download_llm"] == len(study.llms)
    assert plan["download_dataset"] == len(study.datasets)
    captioned = [d for d in study.datasets.values() if d.captioner]
    own = [d for d in captioned if study.captioners[d.captioner].engine == "vllm"]
    assert plan["caption_by_vllm"] == sum(d.captioner_parts for d in own)
    assert plan["caption"] == len(captioned) - len(own) == 1
    assert plan["captions"] == len(captioned)
    assert plan["table"] == len(study.tables)
    assert plan["figure"] == len(study.figures)
    # Training embeddings: four sets of parts (an LLM and a training set), each of three kinds.
    cc3m, yfcc15m = (sum(study.datasets[name].parts.values()) for name in ("cc3m", "yfcc15m"))
    assert plan["embed_training"] == 3 * cc3m + yfcc15m


def foretold(study: Study, *names: str) -> dict[str, int]:
    return Extent(study, names).jobs()


def without_sums(counts: dict[str, int]) -> dict[str, int]:
    return {rule: count for rule, count in counts.items() if rule not in ("all", "total")}


def test_jobs_are_foretold(study, plan):
    assert foretold(study) == without_sums(plan)


@pytest.mark.parametrize("name", [*load_file(PAPER, ROOT).tables, *load_file(PAPER, ROOT).figures])
def test_a_part_of_the_paper_asks_for_what_it_needs(study, plan, name, tmp_path):
    extension = "png" if name in study.figures else "csv"
    part = jobs(tmp_path, f"results/{name}.{extension}")
    assert foretold(study, name) == without_sums(part)
    assert all(count <= plan[rule] for rule, count in part.items() if rule != "total")
    asked = study.figure_results(name) if extension == "png" else study.table_comparison(name)[1]
    assert part.get("evaluate", 0) + part.get("fewshot", 0) == len(asked)
    assert part["total"] < plan["total"]
