"""Every job has one description, which the rules and the plan share."""

import re
from pathlib import Path

import pytest

from flame.study import files, jobs, stages
from flame.study.load import load_file
from flame.study.schema.runs import Validation
from flame.study.settings import ValidationSettings
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
        f"flame-{prompts}{seed}" for prompts in (1, 3, 5, 7, 9) for seed in ("", ".seed1", ".seed2")
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


def validated(study: Study, run: str, **options) -> Study:
    chosen = study.runs[run].model_copy(update={"validation": Validation(**options)})
    return changed(study, runs={**study.runs, run: chosen})


def changed(study: Study, **blocks) -> Study:
    """With other blocks; a copy would keep what is cached of the old ones."""
    return Study(**{name: getattr(study, name) for name in Study.model_fields} | blocks)


def test_a_validation_adds_inputs_and_changes_no_param(study):
    options = {"benchmarks": ("ImageNet-1k", "ShareGPT4V-val"), "every": 4, "images": 100}
    for run, stores in (
        ("flame-7", ["classification/class/0.zarr", "retrieval/long/0.zarr"]),
        ("clip", []),
        ("long-clip", []),
    ):
        with_validation = validated(study, run, **options)
        before, after = jobs.train(study, run), jobs.train(with_validation, run)
        own = {"validation_datasets", "validation_stores"}
        assert after.params == before.params
        assert after.inputs.keys() == before.inputs.keys()
        assert not any(before.inputs[name] for name in own)
        assert {k: v for k, v in after.inputs.items() if k not in own} == {
            k: v for k, v in before.inputs.items() if k not in own
        }
        datasets = ["resources/datasets/nouns", "resources/datasets/scenes-long"]
        assert after.inputs["validation_datasets"] == datasets
        embedded = [f"results/embed/smollm2-135m/{store}" for store in stores]
        assert after.inputs["validation_stores"] == embedded
        assert own < set(after.ancient)


def test_a_validation_asks_a_run_what_its_evaluation_asks(study):
    chosen = validated(study, "flame-7", benchmarks=("ImageNet-1k", "ShareGPT4V-val"), every=4)
    settings = stages.validation(chosen, "flame-7")
    assert set(settings.questions) < set(study.questions("flame-7"))
    assert [q.benchmark for q in settings.questions] == ["ImageNet-1k", "ShareGPT4V-val"]
    assert stages.validation(chosen, "flame-5") == ValidationSettings()


def test_the_validation_of_a_study_is_that_of_runs_without_their_own(study):
    both = validated(study, "flame-7", benchmarks=("MSCOCO",))
    both = changed(both, validation=Validation(benchmarks=("DTD",), every=2))
    assert [q.benchmark for q in both.validation_questions("flame-7")] == ["MSCOCO"]
    assert [q.benchmark for q in both.validation_questions("clip")] == ["DTD"]
    assert stages.validation(both, "clip").every == 2
    pretrained = [run for run in both.runs if not both.trained(run)]
    assert all(both.validation_of(run) is None for run in pretrained)
