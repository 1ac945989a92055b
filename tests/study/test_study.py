"""A study is checked whole, before anything runs; a mistake names path, value and known ones."""

import copy
from pathlib import Path

import pytest
import yaml

from flame.study import include, jobs, origin, stages
from flame.study.load import StudyError, load, load_file
from flame.study.study import Study

ROOT = Path(__file__).parents[2]
STUDIES = ["config/config.yaml", "tests/config/tiny.yaml", "tests/config/whole.yaml"]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(ROOT / "config/config.yaml", ROOT)


def values() -> dict:
    return include.whole(yaml.safe_load((ROOT / "config/config.yaml").read_text()), ROOT)


def change(path: str, value: object) -> dict:
    """The default study with one value set, or one key added."""
    changed = copy.deepcopy(values())
    *parents, last = path.split("/")
    node = changed
    for step in parents:
        node = node[int(step) if isinstance(node, list) else step]
    node[int(last) if isinstance(node, list) else last] = value
    return changed


@pytest.mark.parametrize("path", STUDIES)
def test_the_studies_of_the_repository_are_valid(path):
    load_file(ROOT / path, ROOT)


BAD = {
    "typo in a key": (
        "recipes/flame/learning_rate",
        1.0,
        ["recipes.flame: unknown key 'learning_rate'", "known: epochs, batch_size, lr"],
    ),
    "typo at the top": ("run", {}, ["unknown key 'run' (did you mean 'runs'?)"]),
    "unknown LLM": (
        "runs/flame-7/llm",
        "smollm-135m",
        ["runs.flame-7.llm: unknown llm 'smollm-135m' (did you mean 'smollm2-135m'?)"],
    ),
    "facet not embedded": (
        "runs/flame-7/targets/long",
        ["scene", "colour"],
        ["runs.flame-7.targets.long: facet not embedded by prompt 'long': 'colour'", "'color'"],
    ),
    "more facets than there are": (
        "runs/flame-9/targets/long",
        10,
        ["runs.flame-9.targets.long: 10 facets wanted, prompt 'long' embeds 9"],
    ),
    "negative batch": (
        "recipes/flame/batch_size",
        -256,
        ["recipes.flame.batch_size: input should be greater than 0, not -256"],
    ),
    "missing file": (
        "tables/table6/reported/file",
        "config/reported/table66.csv",
        ["tables.table6.reported.file: no such file: 'config/reported/table66.csv'"],
    ),
    "unknown run in a table": (
        "tables/table6/rows/0/run",
        "flame-2",
        ["tables.table6.rows.0.run: unknown run 'flame-2'", "known: flame-1, flame-3, "],
    ),
    "unknown benchmark in a table": (
        "tables/table6/columns/0/benchmark",
        "ShareGPT4V",
        ["tables.table6.columns.0: unknown benchmark 'ShareGPT4V'", "ShareGPT4V-val"],
    ),
    "unknown data set": (
        "benchmarks/MSCOCO/dataset",
        "coco",
        ["benchmarks.MSCOCO.dataset: unknown dataset 'coco'", "scenes-short"],
    ),
    "unknown task": (
        "benchmarks/MSCOCO/task",
        "retreival",
        ["benchmarks.MSCOCO.task: unknown task 'retreival' (did you mean 'retrieval'?)"],
    ),
    "unknown data set module": (
        "datasets/scenes/source",
        "scnes",
        ["datasets.scenes: ", "'scnes'", "scenes"],
    ),
    "unknown option of a data set": (
        "datasets/scenes/options/imagse",
        100,
        ["datasets.scenes: unknown option 'imagse' (did you mean 'images'?)"],
    ),
    "bad option of a data set": (
        "datasets/scenes/options/images",
        -3,
        ["datasets.scenes", "images", "greater than 0"],
    ),
    "template without a caption": (
        "prompts/long/template",
        "Describe: {facet}",
        ["prompts.long: template: needs '{caption}' once"],
    ),
    "unknown kind of captions": (
        "benchmarks/MSCOCO/captions",
        "medium",
        ["benchmarks.MSCOCO.captions: no prompt embeds captions of kind 'medium'"],
    ),
    "unknown source of a checkpoint": (
        "llms/smollm2-135m/checkpoint",
        {"source": "web", "id": "x"},
        ["llms.smollm2-135m.checkpoint: unknown kind of block 'web'", "known: package, hub, "],
    ),
    "unknown backbone": (
        "backbones/resnet/timm",
        "resnet19",
        ["backbones.resnet", "'resnet19'", "resnet18"],
    ),
    "unknown CLIP to start from": (
        "runs/long-clip/base",
        "flame-7",
        ["runs.long-clip.base: no CLIP run 'flame-7'", "known: clip, clip-small"],
    ),
    "unknown benchmark in a validation": (
        "runs/clip/validation",
        {"benchmarks": ["Flickr"]},
        ["runs.clip.validation.benchmarks: unknown benchmark 'Flickr'", "ShareGPT4V-val"],
    ),
    "validation that trains a classifier": (
        "validation",
        {"benchmarks": ["MSCOCO", "DTD probe"]},
        ["validation.benchmarks: 'DTD probe' is no validation, because its task 'probe' needs"],
    ),
    "unknown text tower": (
        "runs/clip/text_tower",
        "transfomer",
        ["runs.clip.text_tower: unknown text_tower 'transfomer' (did you mean 'transformer'?)"],
    ),
    "unknown method": (
        "runs/clip/method",
        "siglip",
        ["runs.clip: unknown kind of block 'siglip'", "known: flame, clip, long-clip, pretrained"],
    ),
    "probe without a training set": (
        "benchmarks/DTD probe/train",
        None,
        ["benchmarks.DTD probe: train: belongs to the task 'probe', and to no other"],
    ),
    "claim about an unknown run": (
        "claims/imagenet-cc3m/better",
        "flame-77",
        ["claims.imagenet-cc3m: unknown run 'flame-77'", "did you mean"],
    ),
    "claim of no kind": (
        "claims/imagenet-cc3m",
        {"text": "x", "where": "y"},
        [
            "claims.imagenet-cc3m: needs better, worse and measures, or ratio and above, or knows, "
            "or untested"
        ],
    ),
    "unknown benchmark in a figure": (
        "figures/figure_d2/benchmark",
        "MSCOCOO",
        ["figures.figure_d2: unknown benchmark 'MSCOCOO' (did you mean 'MSCOCO'?)"],
    ),
    "unknown kind of figure": (
        "figures/figure_d2/kind",
        "gallery",
        ["figures.figure_d2: unknown kind of figure 'gallery'", "known: captions, examples, "],
    ),
    "captions of other images in a figure": (
        "figures/captions",
        {
            "kind": "captions",
            "title": "x",
            "datasets": {"own": "scenes", "published": "scenes-long"},
            "kinds": ["long", "medium"],
            "llm": "gpt",
        },
        [
            "figures.captions.datasets: 'scenes' and 'scenes-long' are not of one source and split",
            "figures.captions.kinds: no prompt embeds captions of kind 'medium'",
            "figures.captions.llm: unknown llm 'gpt'",
        ],
    ),
    "one set of captions in a figure": (
        "figures/captions",
        {
            "kind": "captions",
            "title": "x",
            "datasets": {"own": "scenes"},
            "kinds": ["long"],
            "llm": "x",
        },
        ["figures.captions.datasets: dictionary should have at least 2 items"],
    ),
    "unknown recipe in the appendix": (
        "appendix/table_a1/recipe",
        "paper",
        ["appendix.table_a1.recipe: unknown recipe 'paper'"],
    ),
    "empty row": (
        "tables/table1/rows/0",
        {"label": "CLIP"},
        ["tables.table1.rows.0: row 'CLIP' has neither a run nor reported numbers"],
    ),
    "unknown captioner": (
        "datasets/scenes/captioner",
        "minicpm",
        ["datasets.scenes.captioner: unknown captioner 'minicpm'; known: none"],
    ),
    "remote code of no fixed revision": (
        "captioners",
        {"mllm": {"engine": "vllm", "id": "a/b", "prompts": {}, "max_tokens": {}}},
        ["captioners.mllm", "revision: field required"],
    ),
    "missing key": (
        "runs/new",
        {"dataset": "scenes"},
        ["runs.new.llm: field required"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_study_is_refused_with_path_value_and_known_ones(case):
    path, value, expected = BAD[case]
    with pytest.raises(StudyError) as error:
        load(change(path, value), "study.yaml", ROOT)
    message = str(error.value)
    assert all(line.startswith("study.yaml: ") for line in message.splitlines())
    for words in expected:
        assert words in message


def test_an_included_file_is_under_the_study(tmp_path):
    (tmp_path / "below.yaml").write_text("a: {b: 1, c: [1, 2]}\nd: 4\n")
    above = {"include": ["below.yaml"], "a": {"b": 5, "c": [3]}, "e": 6}
    assert include.whole(above, tmp_path) == {"a": {"b": 5, "c": [3]}, "d": 4, "e": 6}
    assert above["include"] == ["below.yaml"]
    with pytest.raises(ValueError, match=r"include: no such file: 'other\.yaml'"):
        include.whole({"include": ["other.yaml"]}, tmp_path)


def test_a_study_keeps_some_entries_of_what_it_includes(tmp_path):
    (tmp_path / "below.yaml").write_text("a: {b: 1, c: 2, d: 3}\nabsent: {x: why}\ne: {f: 4}\n")
    above = {
        "include": ["below.yaml"],
        "keep": {"a": ["b", "d"], "absent": []},
        "a": {"d": 5, "g": 6},
    }
    assert include.whole(above, tmp_path) == {"a": {"b": 1, "d": 5, "g": 6}, "e": {"f": 4}}
    with pytest.raises(ValueError, match=r"keep\.a: not included: 'bb' \(did you mean 'b'"):
        include.whole(above | {"keep": {"a": ["bb"]}}, tmp_path)
    with pytest.raises(ValueError, match="keep: no included section 'g'; known: a, absent, e"):
        include.whole(above | {"keep": {"g": ["b"]}}, tmp_path)


def test_the_study_of_cc3m_trains_two_towers_on_published_captions():
    study = load_file(ROOT / "config/cc3m.yaml", ROOT)
    planned = list(jobs.closure(study, jobs.targets(study)))
    assert {job.wildcards["run"] for job in planned if job.rule == "train"} == {"flame-7", "clip"}
    assert {job.wildcards["captioner"] for job in planned if job.rule == "captions"} == {
        "published-cc3m"
    }
    assert study.embedded_facets("mistral-nemo", "cc3m", "long") == study.prompts["long"].default
    # Rows of other runs have what the paper reports.
    rows = {study.label_of(row): row for row in study.tables["table1"].rows}
    assert rows["FLAME, YFCC15M"].run is None
    assert rows["FLAME, YFCC15M"].reported is not None
    # Without a form: all but ShareGPT4V-val of Table 1.
    for name in ("table2", "table3"):
        planned = jobs.closure(study, [f"results/{name}.csv"])
        sources = {
            study.datasets[job.wildcards["dataset"]].source
            for job in planned
            if job.rule == "download_dataset"
        }
        assert not sources & {"sharegpt4v", "dci", "yfcc15m"}


def test_without_an_absent_run_its_row_is_reported_and_its_claim_untested(study):
    rows = {study.label_of(row): row for row in study.tables["table1"].rows}
    assert rows["CLIP, WIT-400M"].run is None
    assert rows["CLIP, WIT-400M"].reported is not None
    assert study.claims["urban-wit"].untested == (
        "the CLIP trained on 400 million images is not part of this study"
    )
    assert study.claims["urban-wit"].better is None
    reported = [claim.reported for claim in study.claims.values() if claim.where.startswith("abs")]
    assert 34.6 in reported


@pytest.mark.parametrize(
    ("name", "words"),
    [("clip-wit", "no table, figure or claim asks for clip-wit"), ("clip", "'clip' is not absent")],
)
def test_an_absent_run_is_asked_for_and_not_defined(name, words):
    with pytest.raises(StudyError, match=words):
        load(values() | {"absent": {name: "why"}}, "study.yaml", ROOT)


def test_every_mistake_is_named_not_only_the_first():
    changed = change("runs/flame-7/llm", "gpt")
    changed["runs"]["flame-9"]["recipe"] = "paper"
    with pytest.raises(StudyError) as error:
        load(changed, "study.yaml", ROOT)
    assert len(str(error.value).splitlines()) == 2


def test_the_nine_prompts_are_those_of_appendix_b(study):
    levels = [study.facets[name].level for name in study.prompts["long"].facets]
    assert levels == ["entity"] * 4 + ["interaction"] * 2 + ["scene"] * 3
    prompt = study.prompts["long"]
    before, after = prompt.prefix
    whole = f"{before}A dog.{after}{prompt.suffix(study.facets['scene'].text)}"
    assert whole == (
        'Detailed image description: "A dog.". After thinking step by step, '
        'this image description means in just one word:"'
    )
    # Appendix B: defaults are 1, 2, 3, 4, 5, 7, 8 for long input and 7 for short input.
    assert [prompt.facets.index(name) + 1 for name in prompt.default] == [1, 2, 3, 4, 5, 7, 8]
    assert study.prompts["short"].default == ("scene",)


def test_facets_are_drawn_with_the_seed_of_the_study(study):
    drawn = study.targets("flame-3")["long"]
    assert len(set(drawn)) == 3
    assert drawn == study.targets("flame-3")["long"]
    others = [
        load(values() | {"seed": seed}, "study.yaml", ROOT).targets("flame-3")["long"]
        for seed in range(1, 6)
    ]
    assert any(other != drawn for other in others)


def test_text_of_a_facet_changes_only_stores_that_hold_it(study):
    edited = load(change("facets/color/text", "the main color"), "study.yaml", ROOT)
    llm = "smollm2-135m"
    long, raw = (llm, "scenes", "long", 0), (llm, "scenes", "raw", 0)
    assert stages.embed(edited, *long) != stages.embed(study, *long)
    assert stages.embed(edited, *raw) == stages.embed(study, *raw)
    assert stages.train(edited, "flame-9") == stages.train(study, "flame-9")


def test_a_run_is_trained_once_for_each_seed():
    changed = change("seeds", [0, 1, 2])
    changed["runs"]["flame-7"]["seeds"] = [5]
    study = load(changed, "study.yaml", ROOT)
    assert study.replicas("clip") == ("clip", "clip.seed1", "clip.seed2")
    assert [stages.train(study, name).seed for name in study.replicas("clip")] == [0, 1, 2]
    assert study.replicas("flame-7") == ("flame-7",)
    assert stages.train(study, "flame-7").seed == 5
    # A fine-tuned run starts from the base of its own seed.
    assert study.base("long-clip.seed2") == "clip.seed2"
    tables = study.table_comparison("table1")[1]
    assert {"evaluate/clip.seed1/retrieval", "evaluate/flame-7/retrieval"} < set(tables)


def test_another_draw_is_another_choice_of_as_many_facets(study):
    names = study.replicas("flame-1")
    assert [study.trainings[name][1:] for name in names] == [(0, 0), (1, 1), (2, 2)]
    drawn = [study.targets(name)["long"] for name in names]
    assert [len(facets) for facets in drawn] == [1, 1, 1]
    assert len(set(drawn)) > 1


def test_one_draw_serves_all_seeds():
    changed = change("runs/flame-1/draws", [2])
    study = load(changed, "study.yaml", ROOT)
    assert len({study.targets(name)["long"] for name in study.replicas("flame-1")}) == 1
    changed["runs"]["flame-1"]["draws"] = [0, 1]
    with pytest.raises(StudyError, match=r"runs\.flame-1\.draws: 2 draws for 3 seeds \[0, 1, 2\]"):
        load(changed, "study.yaml", ROOT)
    changed["runs"]["flame-1"] |= {"draws": [0], "seeds": [0, 1, 0]}
    with pytest.raises(StudyError, match=r"runs\.flame-1\.seeds: \[0, 1, 0\] has a seed twice"):
        load(changed, "study.yaml", ROOT)


def test_runs_of_a_kind_tell_how_much_trainings_differ(study):
    """Drawn prompts are another source of chance, so such runs are a kind of their own."""
    kinds = {run: study.compared(run).kind for run in study.runs}
    assert kinds["flame-1"] == kinds["flame-5"] == ("flame", True)
    assert kinds["flame-7"] == kinds["flame-9"] == kinds["large-flame"] == ("flame", False)
    assert kinds["clip"] == ("clip", False)
    assert not study.is_drawn("flame-9")  # all nine
    # A table asks for the replicated runs that something asks of its benchmarks anyway.
    assert "flame-9" in study.table_comparison("table3")[0]
    assert "flame-9" not in study.table_comparison("table5")[0]


def test_every_difference_of_the_demo_study_covers_the_chance_in_trainings(study):
    """At least two degrees of freedom of both kinds, in every column of every table."""
    for table in study.tables.values():
        for column in table.columns:
            groups = [column.measures]
            for run in table.runs:
                kind = study.compared(run).kind
                others = study.comparison([run], groups)[0]
                alike = [name for name in others if study.compared(name).kind == kind]
                assert sum(len(study.replicas(name)) - 1 for name in alike) >= 2


def test_stores_hold_the_facets_that_are_used_or_all():
    used = load(change("embedding/facets", "used"), "study.yaml", ROOT)
    every = load(change("embedding/facets", "all"), "study.yaml", ROOT)
    llm, prompt = "smollm2-135m", used.prompts["long"]
    assert every.embedded_facets(llm, "scenes-large", "long") == prompt.facets
    assert used.embedded_facets(llm, "scenes-large", "long") == prompt.default
    assert used.embedded_facets(llm, "scenes", "long") == prompt.facets
    # What a tower is made from is the same either way.
    assert origin.train(used, "flame-7") == origin.train(every, "flame-7")


def test_a_figure_of_captions_pulls_stores_that_nothing_else_asks_for():
    changed = change("embedding/facets", "used")
    plain = load(changed, "study.yaml", ROOT)
    for name, grammars in (("told", "train"), ("told-again", "held-out")):
        options = {"split": "told", "images": 8, "long": 1, "grammars": grammars}
        changed["datasets"][name] = {"source": "scenes", "bundle": "told", "options": options}
    changed["figures"]["captions"] = {
        "kind": "captions",
        "title": "x",
        "datasets": {"one": "told", "other": "told-again"},
        "kinds": ["long"],
        "llm": "smollm2-135m",
    }
    study = load(changed, "study.yaml", ROOT)
    assert study.figure_stores("captions") == (("smollm2-135m", "told", "long"),)
    embedded = stages.embed(study, "smollm2-135m", "told", "long", 0)
    assert embedded.datasets == ("told", "told-again")
    assert tuple(embedded.facets) == study.prompts["long"].default
    assert stages.figure(study, "captions").averaged == {"long": study.prompts["long"].default}
    # Other stores are what they were.
    other = ("smollm2-135m", "scenes", "long", 0)
    assert stages.embed(study, *other) == stages.embed(plain, *other)


def test_tables_pull_what_they_are_made_of(study):
    once = ["flame-gemma", "flame-random", "flame-small", "flame-large", "clip-small", "clip-large"]
    thrice = ["flame-7", "clip", "flame-9"]  # flame-9 tells how much trainings differ
    trainings = [*once, *(name for run in thrice for name in study.replicas(run))]
    found = study.table_comparison("table7")[1]
    assert set(found) == {f"evaluate/{name}/classification" for name in trainings}
    assert set(study.table_comparison("table_c5")[1]) == {
        f"fewshot/{name}/MiniImageNet" for name in ["flame-gemma", *study.replicas("flame-7")]
    }
    assert study.figure_results("figure3") == ()
