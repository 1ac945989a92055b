"""A measured number never stands under the bare name of a benchmark that was not measured."""

from pathlib import Path

import pytest

from flame.data import datasets
from flame.study import stages
from flame.study.load import load_file
from flame.study.names import called, in_label
from flame.study.schema.benchmarks import FEWSHOT
from flame.study.study import Study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> Study:
    return load_file(ROOT / "config/config.yaml", ROOT)


@pytest.fixture(scope="module")
def paper() -> Study:
    return load_file(ROOT / "config/paper.yaml", ROOT)


@pytest.mark.parametrize(
    ("name", "sets", "stand_in", "expected"),
    [
        ("ImageNet-1k", ["imagenet1k"], False, "ImageNet-1k"),
        ("ImageNet-1k", ["nouns"], True, "nouns (for ImageNet-1k)"),
        ("scenes-minor", ["scenes-minor"], True, "scenes-minor"),
        ("long text", ["a", "b"], True, "a and b (for long text)"),
        ("average of 3 sets", ["a", "b", "c"], True, "3 stand-ins (for average of 3 sets)"),
    ],
)
def test_names(name, sets, stand_in, expected):
    assert called(name, sets, stand_in=stand_in) == expected


def test_a_label_names_the_training_set():
    assert in_label("FLAME, {CC3M}", "cc3m", stand_in=False) == "FLAME, CC3M"
    assert in_label("FLAME, {CC3M}", "scenes", stand_in=True) == "FLAME, scenes (for CC3M)"
    assert in_label("FLAME, {CC3M}", None, stand_in=False) == "FLAME, CC3M"
    assert in_label("7", "scenes", stand_in=True) == "7"


def real_names() -> list[str]:
    """Names of the benchmarks and training sets of the field."""
    cards = [datasets.module(name).CARD for name in datasets.names()]
    return [card.title.split(",")[0].split(" (")[0] for card in cards if not card.drawn]


def test_no_data_set_of_the_demo_study_has_the_name_of_a_real_one(demo: Study):
    real = {name.lower() for name in real_names()}
    assert not real & {name.lower() for name in demo.datasets}


def test_every_name_of_the_demo_study_says_what_was_measured(demo: Study):
    for name, benchmark in demo.benchmarks.items():
        if any(real.lower() in name.lower() for real in real_names()):
            assert demo.name_of(name) == f"{benchmark.dataset} (for {name})"
    for name in demo.tables:
        for row in stages.table(demo, name).table.rows:
            assert "{" not in row.label
            if row.run is not None:
                assert ("CC3M" in row.label) == ("scenes (for CC3M)" in row.label)
    label = next(r.label for r in stages.table(demo, "table1").table.rows if r.run == "flame-7")
    assert label == "FLAME, scenes (for CC3M)"


def test_benchmarks_of_our_own_stand_for_nothing(demo: Study):
    own = [name for name, benchmark in demo.benchmarks.items() if benchmark.task == "within"]
    assert own
    assert [demo.name_of(name) for name in own] == own


def test_the_name_reaches_evaluations(demo: Study):
    questions = stages.evaluate(demo, "flame-7", "classification").questions
    names = {question.benchmark: question.name for question in questions}
    assert names["ImageNet-1k"] == "nouns (for ImageNet-1k)"
    (fewshot,) = (n for n, b in demo.benchmarks.items() if b.task == FEWSHOT)
    assert stages.fewshot(demo, "flame-7", fewshot).name == "nouns (for MiniImageNet)"


def test_the_papers_study_measures_what_its_names_say(paper: Study):
    assert all(paper.name_of(name) == name for name in paper.benchmarks)
    rows = stages.table(paper, "table1").table.rows
    assert [row.label for row in rows][:3] == ["CLIP, CC3M", "Long-CLIP, CC3M", "FLAME, CC3M"]
    assert stages.table(paper, "table1").stand_ins == ()


def test_a_benchmark_can_say_itself_whether_its_data_set_is_a_stand_in(demo: Study):
    own = demo.benchmarks["ImageNet-1k"].model_copy(update={"stand_in": False})
    changed = demo.model_copy(update={"benchmarks": demo.benchmarks | {"ImageNet-1k": own}})
    assert changed.name_of("ImageNet-1k") == "ImageNet-1k"
