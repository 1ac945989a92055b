"""Every job has one description, which the rules and the plan share."""

import re
from pathlib import Path

import pytest

from flame.study import files, jobs
from flame.study.load import load_file
from flame.study.study import Study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(ROOT / "config/config.yaml", ROOT)


def rules() -> dict[str, set[str]]:
    """Rule -> its outputs, as the rule files write them."""
    found = {}
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for name, body in re.findall(
            r"^rule (\w+):\n(.*?)(?=^\S|\Z)", path.read_text(), re.M | re.S
        ):
            output = body.split("    output:\n")[1].split("    log:\n")[0]
            found[name] = set(re.findall(r'"((?:results|resources)/[^"]+)"', output))
    return found


def test_outputs_are_those_of_the_rules():
    assert {rule: set(paths) for rule, paths in files.OUTPUTS.items()} == rules()
    assert set(jobs.JOBS) == set(files.OUTPUTS)


def test_every_output_names_its_own_job(study):
    for planned in jobs.closure(study, jobs.targets(study)):
        for pattern in files.OUTPUTS[planned.rule]:
            made_by = jobs.producer(study, pattern.format(**planned.wildcards))
            assert made_by == (planned.rule, planned.wildcards)


def test_a_closure_holds_what_its_jobs_read_and_each_job_once(study):
    planned = list(jobs.closure(study, ["results/table6.csv"]))
    made = {files.output(each.rule, **each.wildcards) for each in planned}
    assert len(made) == len(planned)
    for each in planned:
        for path in each.job.paths:
            rule, wildcards = jobs.producer(study, path)
            assert files.output(rule, **wildcards) in made
    assert {each.wildcards["run"] for each in planned if each.rule == "train"} == {
        f"flame-{prompts}" for prompts in (1, 3, 5, 7, 9)
    }


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("results/train/flame-77", r"unknown run 'flame-77' \(did you mean 'flame-7'\?\)"),
        ("results/fewshot/clip/MiniImageNet.json", "few-shot needs a FLAME run"),
        ("results/export/clip", "run 'clip' is not FLAME, and only FLAME is exported"),
        ("resources/towers/clip", "run 'clip' is trained here: results/train/clip"),
        ("results/embed/smollm2-135m/scenes/medium/0.zarr", "no run, benchmark or figure"),
        ("results/table66.csv", "no rule writes 'results/table66.csv'|unknown appendix 'table66'"),
    ],
)
def test_what_the_study_cannot_make_is_refused_with_the_reason(study, path, words):
    with pytest.raises(ValueError, match=words):
        list(jobs.closure(study, [path]))
