"""What is asked for decides what is fetched, embedded and evaluated, in every study of config/."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flame.study import files, jobs
from flame.study.load import load_file
from flame.study.study import Study

ROOT = Path(__file__).parents[2]
STUDIES = {path.stem: load_file(path, ROOT) for path in sorted((ROOT / "config").glob("*.yaml"))}
# In the demo study a start costs more than these few drawn images, so that Tables 1 and 2 and
# Figure D2 share one job; in the other studies, four languages more are texts for the same images.
RETRIEVAL = {"ShareGPT4V-val", "Urban-1k", "MSCOCO", "Flickr30k"}
LANGUAGES = {f"multilingual ImageNet-1k {language}" for language in ("ar", "it", "ja", "zh")}
SHARED = {("config", name): RETRIEVAL for name in ("table1", "table2", "figure_d2")}
SHARED |= {(name, "sanity"): LANGUAGES for name in STUDIES if name != "config"}


def targets() -> Iterator[tuple[str, str]]:
    for name, study in STUDIES.items():
        yield from ((name, target) for target in (*study.tables, *study.figures, "claims"))


def planned_for(study: Study, target: str) -> list[jobs.Planned]:
    rule = "table" if target in study.tables else "figure" if target in study.figures else target
    return list(jobs.closure(study, [files.output(rule, **{rule: target})]))


def read_by(study: Study, target: str) -> set[str]:
    """Benchmarks with a number in a table, figure or claim."""
    if target == "claims":
        measures = [m for claim in study.claims.values() for m in claim.measures]
    elif target == "variance":
        measures = [m for table in study.tables.values() for m in table.measures]
    elif target in study.tables:
        measures = [*study.tables[target].measures]
        measures += [m for claim in study.claims_under(target) for m in claim.measures]
    else:
        measures = [*study.figures[target].uses()[1]]
    return {measure.benchmark for measure in measures}


@pytest.mark.parametrize(("name", "target"), [*targets()])
def test_a_target_has_no_data_set_that_it_does_not_read(name, target):
    study = STUDIES[name]
    planned = planned_for(study, target)
    may = read_by(study, target) | SHARED.get((name, target), set())
    evaluated = {
        question.benchmark
        for job in planned
        if job.rule == "evaluate"
        for question in study.questions(job.wildcards["run"], job.wildcards["bundle"])
    }
    assert evaluated <= may
    read = {d for b in may for d in (study.benchmarks[b].dataset, study.benchmarks[b].train)}
    learned = {job.wildcards["run"] for job in planned if job.rule == "train"}
    if any(job.rule == "overhead" for job in planned):
        learned.add(study.overhead.run)
    read |= {study.dataset_of(run) for run in learned}
    if any(job.rule == "knowledge" for job in planned):
        read.add(study.knowledge.dataset)
    if target in study.figures:
        read |= {dataset for _, dataset, _ in study.figures[target].stores()}
    pulled = {job.wildcards["dataset"] for job in planned if job.rule == "download_dataset"}
    assert pulled <= read
    embedded = [job.wildcards for job in planned if job.rule == "embed"]
    sets = {d for w in embedded for d in study.bundle_datasets(w["bundle"], w["kind"])}
    assert sets <= read


def test_a_job_does_not_depend_on_who_asks_for_it():
    study = STUDIES["config"]
    table1, table6 = (
        {(job.rule, *job.wildcards.values()): job.job for job in planned_for(study, name)}
        for name in ("table1", "table6")
    )
    shared = table1.keys() & table6.keys()
    assert {rule for rule, *_ in shared} >= {"embed", "train", "evaluate"}
    assert all(table1[job] == table6[job] for job in shared)


def test_table_6_asks_for_nothing_of_table_c4_and_no_probes():
    for name in ("config", "paper", "release"):
        study = STUDIES[name]
        planned = planned_for(study, "table6")
        pulled = {job.wildcards["dataset"] for job in planned if job.rule == "download_dataset"}
        # A training set, two sets with long captions, two with short ones, eleven of classes.
        assert len(pulled) == 16
        others = [b for b in study.benchmarks.values() if b.task == "probe"]
        others += [study.benchmarks[benchmark] for benchmark in ("DCI", "DOCCI-test")]
        assert not pulled & {b.train or b.dataset for b in others}


def test_a_probe_is_evaluated_with_others_that_share_its_training_sets_bundle():
    study = STUDIES["paper"]
    assert study.evaluated_in("Food-101") == "downstream"
    assert study.evaluated_in("Food-101 probe") == "probes"
    probes = study.questions("clip", "probes")
    assert [q.task for q in probes] == ["probe"] * 7
    assert jobs.evaluate(study, "flame-7", "probes").inputs["stores"] == []


def test_the_demo_study_does_not_start_many_more_jobs_for_it():
    study = STUDIES["config"]
    planned = list(jobs.closure(study, jobs.targets(study)))
    assert len(planned) <= 287
