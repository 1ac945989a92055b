"""How much numbers vary, from results whose variances are known."""

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from flame.evaluation.records import Queries
from flame.report import figures, variance
from flame.report.results import Results
from flame.study.schema.figures import module
from flame.study.schema.tables import Column, Measure
from flame.study.settings import Compared, FigureSettings, VarianceSettings
from flame.table import tell_variance
from tests.answers import counted, write

MEASURE = Measure(benchmark="COCO", metric="i2t_r@1")
KEYS = tuple(map(str, range(200)))


def run(*names, method="flame", drawn=False):
    return Compared(trainings=names, method=method, drawn=drawn)


def simulated(rng, seed: float, draw: float, count: int, trainings: int = 6) -> Results:
    """Runs with normal results; trainings differ by `seed`, drawn ones by `draw` in addition."""
    answers, runs = {}, {}
    query = rng.normal(0, 0.3, len(KEYS))
    for number in range(count):
        for drawn in (False, True):
            names = tuple(f"{number}{drawn}.{n}" for n in range(trainings))
            runs[names[0]] = run(*names, drawn=drawn)
            of_run = query + rng.normal(0, 0.2, len(KEYS))
            for name in names:
                move = rng.normal(0, seed) + drawn * rng.normal(0, draw)
                values = of_run + move + rng.normal(0, 0.1, len(KEYS))
                answers[name, "COCO", "i2t_r@1"] = Queries(KEYS, values)
    return Results(answers, runs)


def test_known_deviations_are_found():
    results = simulated(np.random.default_rng(0), seed=0.03, draw=0.05, count=20)
    found = variance.variation(results, "flame", [MEASURE])
    assert found.trainings == 2 * 20 * 6
    assert (found.seeds_df, found.draws_df) == (100, 100)
    interaction = 0.1 / np.sqrt(len(KEYS))
    assert found.seeds == pytest.approx(100 * np.hypot(0.03, interaction), rel=0.1)
    assert found.draws == pytest.approx(5.0, rel=0.2)
    assert found.queries == pytest.approx(100 * np.hypot(0.3, 0.2) / np.sqrt(len(KEYS)), rel=0.1)


@pytest.mark.parametrize("trainings", variance.PLANNED)
def test_the_difference_that_would_be_found_is_found_in_80_percent_of_studies(trainings):
    """By the intervals of other studies, whose runs are trained so many times."""
    rng = np.random.default_rng(0)
    known = simulated(rng, seed=0.03, draw=0.0, count=10)
    place = variance.PLANNED.index(trainings)
    difference = variance.variation(known, "flame", [MEASURE]).found[place] / 100
    hits, draws = 0, 400
    for _ in range(draws):
        answers = dict(known.answers)
        runs = dict(known.runs)
        query = rng.normal(0, 0.3, len(KEYS))
        for name, mean in (("better", difference), ("worse", 0.0)):
            trained = tuple(f"{name}.{n}" for n in range(trainings))
            runs[name] = run(*trained)
            of_run = mean + query + rng.normal(0, 0.2, len(KEYS))
            for training in trained:
                values = of_run + rng.normal(0, 0.03) + rng.normal(0, 0.1, len(KEYS))
                answers[training, "COCO", "i2t_r@1"] = Queries(KEYS, values)
        hits += Results(answers, runs).difference("better", "worse", [MEASURE]).low > 0
    assert 0.74 < hits / draws < 0.86


def told(folder, hits, runs):
    files = [
        write(folder, name, {"COCO": {"i2t_r@1": counted(n, 100)}}) for name, n in hits.items()
    ]
    column = Column(benchmark="COCO", metric="i2t_r@1")
    settings = VarianceSettings(
        study="tiny",
        tables={"table1": (column,), "table6": (column,)},
        datasets={"COCO": "scenes-short"},
        stand_ins=("COCO",),
        runs=runs,
        version=1,
    )
    paths = folder / "variance.csv", folder / "variance.md"
    tell_variance([f[0] for f in files], [f[1] for f in files], *paths, settings)
    return pl.read_csv(paths[0]), paths[1].read_text()


def draw(folder) -> Figure:
    settings = FigureSettings.model_validate(
        {
            "study": "tiny",
            "name": "variance",
            "figure": {"kind": "variance", "title": "Noise", "tables": ["table6"]},
            "datasets": {},
            "runs": {},
            "version": 1,
        }
    )
    with figures.style():
        return module("variance").draw([folder / "variance.csv"], settings)


def test_a_number_of_two_tables_is_told_once_for_each_method(tmp_path):
    hits = {"a": 50, "a.1": 60, "a.2": 70, "b": 40, "b.1": 60, "b.2": 50}
    hits |= {"c": 30, "c.1": 32, "c.2": 34}
    runs = {
        "a": run("a", "a.1", "a.2"),
        "b": run("b", "b.1", "b.2", drawn=True),
        "c": run("c", "c.1", "c.2", method="clip"),
    }
    frame, page = told(tmp_path, hits, runs)
    assert frame["tables"].to_list() == ["table1 table6"] * 2
    flame, clip = frame.to_dicts()
    assert (flame["method"], flame["seeds"], flame["draws"]) == ("FLAME", 10.0, 0.0)
    assert (clip["method"], clip["seeds"], clip["draws"]) == ("CLIP", 2.0, None)
    assert flame["found_3"] < flame["found_1"]
    assert "| scenes-short (for COCO) | I2T R@1 | 10.0 (2) | 0.0 (2) |" in page
    assert "| 2.0 (2) |  |" in page

    figure = draw(tmp_path)
    first, second = figure.axes
    assert first.get_title() == "FLAME (up to 6 trainings)"
    dots = {line.get_label(): list(line.get_xdata()) for line in first.lines}
    assert dots["seeds"] == [10.0]
    assert dots["found with 3 trainings"] == [flame["found_3"]]
    assert first.get_xlim() == second.get_xlim()
    assert first.get_xlim()[0] == 0
    assert "scenes-short (for COCO)" in first.get_yticklabels()[0].get_text()


def test_a_study_without_replicated_runs_says_so(tmp_path):
    frame, page = told(tmp_path, {"a": 50}, {"a": run("a")})
    assert frame.is_empty()
    assert "No run of this study was trained several times" in page
    assert any("No run" in text.get_text() for text in draw(tmp_path).texts)
