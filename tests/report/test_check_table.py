"""A measured number agrees with the published one within the tolerance, or differs."""

import copy
from pathlib import Path

import polars as pl
import pytest
import yaml

from flame.report import check_table
from flame.study import include
from flame.study.load import StudyError, load, load_file
from flame.study.schema.runs import PretrainedRun
from flame.study.schema.tables import Table
from flame.study.settings import Compared, TableSettings
from flame.table import fill_table
from tests.answers import counted, write

ROOT = Path(__file__).parents[2]
PUBLISHED = """\
name,tag,benchmark,metric,value,source
B,openai,COCO,i2t_r@1,52.40,its makers
B,openai,COCO,t2i_r@1,30.10,its makers
B,openai,average,i2t_r@1,40.00,its makers
L,openai,COCO,i2t_r@1,56.30,its makers
L,openai,COCO,t2i_r@1,36.50,its makers
L,openai,average,i2t_r@1,,its makers
"""
# Of 1000 queries, so that a hit is a tenth of a point.
HITS = {
    "base": {"i2t_r@1": 524, "t2i_r@1": 301, "de": 300, "fr": 500},
    "large": {"i2t_r@1": 563, "t2i_r@1": 365, "de": 300, "fr": 500},
}
BASE = {"label": "CLIP, base", "run": "base", "reported": {"name": "B", "tag": "openai"}}
LARGE = {"label": "CLIP, large", "run": "large", "reported": {"name": "L", "tag": "openai"}}
I2T, T2I = {"benchmark": "COCO", "metric": "i2t_r@1"}, {"benchmark": "COCO", "metric": "t2i_r@1"}
MEAN = {"benchmark": "average", "metric": "i2t_r@1", "mean_of": ["de", "fr"]}


def checked(folder: Path, rows, columns, tolerance=0.5, **hits: int) -> tuple[list[dict], str]:
    """Lines of the CSV, and the Markdown; `base_t2i=340` replaces a count in HITS."""
    files = []
    for run, counts in HITS.items():
        changed = {name.split("_")[1]: n for name, n in hits.items() if name.startswith(run)}
        counts = counts | {f"{way}_r@1": n for way, n in changed.items()}
        coco = {m: counted(counts[m], 1000) for m in ("i2t_r@1", "t2i_r@1")}
        languages = {name: {"i2t_r@1": counted(counts[name], 1000)} for name in ("de", "fr")}
        files.append(write(folder, run, {"COCO": coco, **languages}))
    (folder / "sanity.csv").write_text(PUBLISHED)
    settings = TableSettings(
        study="tiny",
        name="sanity",
        table=Table(
            title="Baselines.",
            row_header="baseline",
            rows=rows,
            columns=columns,
            reported={"file": "sanity.csv"},
            tolerance=tolerance,
        ),
        claims=(),
        datasets={"COCO": "mscoco", "de": "crossmodal-de", "fr": "crossmodal-fr"},
        runs={
            run: Compared(trainings=(run,), method=None, drawn=False) for run in ("base", "large")
        },
        version=1,
    )
    out = folder / "t.csv", folder / "t.md"
    fill_table([f[0] for f in files], [f[1] for f in files], *out, settings, folder / "sanity.csv")
    return pl.read_csv(out[0]).to_dicts(), out[1].read_text()


def lines_of(markdown: str) -> list[str]:
    return [line for line in markdown.splitlines() if line.startswith("| CLIP")]


def test_what_was_measured_stands_beside_what_was_published(tmp_path):
    (record,), markdown = checked(tmp_path, [BASE], [I2T], base_i2t=526)
    assert record["baseline"] == "CLIP, base"
    assert (record["benchmark"], record["metric"]) == ("COCO", "i2t_r@1")
    assert (record["published"], record["measured"], record["difference"]) == (52.4, 52.6, 0.2)
    assert record["95% low"] < 52.6 < record["95% high"]
    assert (record["verdict"], record["hint"]) == ("agrees", None)
    low, high = record["95% low"], record["95% high"]
    assert lines_of(markdown) == [
        f"| CLIP, base | COCO | I2T R@1 | 52.40 | 52.60<br><sub>{low:.1f}-{high:.1f}</sub>"
        " | +0.20 | agrees |"
    ]
    told = " ".join(markdown.split())
    assert "Of 1 numbers, **1 agree**, **0 differ** and 0 were not measured." in told
    assert "within 0.5 points of the published one" in told


@pytest.mark.parametrize(
    ("hits", "tolerance", "difference", "word"),
    [
        (529, 0.5, 0.5, "agrees"),
        (519, 0.5, -0.5, "agrees"),
        (530, 0.5, 0.6, "differs"),
        (518, 0.5, -0.6, "differs"),
        (530, 0.7, 0.6, "agrees"),
    ],
)
def test_the_tolerance_counts_both_ways_and_with_its_end(
    tmp_path, hits, tolerance, difference, word
):
    """52.9 - 52.4 is not exactly 0.5 in floating point."""
    (record,), markdown = checked(tmp_path, [BASE], [I2T], tolerance, base_i2t=hits)
    assert (record["difference"], record["verdict"]) == (difference, word)
    assert ("**differs**: " in lines_of(markdown)[0]) == (word == "differs")


def test_the_same_number_does_not_differ_by_less_than_nothing(tmp_path):
    """In floating point, 301 of 1000 is slightly less than 30.1 percent."""
    (record,), markdown = checked(tmp_path, [BASE], [T2I])
    assert str(record["difference"]) == "0.0"
    assert "| +0.00 | agrees |" in markdown


def test_a_mean_of_benchmarks_is_checked_as_one_number(tmp_path):
    (record,), markdown = checked(tmp_path, [BASE], [MEAN])
    assert (record["measured"], record["verdict"]) == (40.0, "agrees")
    assert "| average | I2T R@1 | 40.00 | 40.00<br>" in markdown


@pytest.mark.parametrize(
    ("hits", "told"),
    [
        ({"base_i2t": 400, "large_i2t": 400, "base_t2i": 200, "large_t2i": 200}, check_table.DATA),
        ({"base_i2t": 400, "base_t2i": 200}, check_table.TOWER),
        ({"base_i2t": 400}, check_table.BOTH),
    ],
)
def test_what_else_differs_says_where_to_look(tmp_path, hits, told):
    records, markdown = checked(tmp_path, [BASE, LARGE], [I2T, T2I], **hits)
    differing = [record for record in records if record["verdict"] == "differs"]
    assert len(differing) == len(hits)
    assert {record["hint"] for record in differing} == {told}
    assert markdown.count(f"| **differs**: {told} |") == len(hits)
    assert f"**{len(hits)} differ**" in markdown


def test_a_baseline_that_a_study_lacks_is_not_measured(tmp_path):
    records, markdown = checked(tmp_path, [{**BASE, "run": None}, LARGE], [I2T])
    assert [record["verdict"] for record in records] == ["not measured", "agrees"]
    assert records[0]["measured"] is None
    assert lines_of(markdown)[0] == ("| CLIP, base | COCO | I2T R@1 | 52.40 |  |  | not measured |")
    assert "1 were not measured" in markdown


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        (LARGE, MEAN, r"sanity\.csv: no published number for average i2t_r@1 of 'CLIP, large'"),
        (BASE, {**I2T, "reported_benchmark": "COCOA"}, "no published number for COCOA i2t_r@1 of "),
        (BASE, {**I2T, "metric": "i2t_r@2"}, "has no metric 'i2t_r@2' .*known: i2t_r@1, t2i_r@1"),
        ({**BASE, "run": "bas"}, I2T, r"no trainings of run 'bas' \(did you mean 'base'\?\)"),
        ({**BASE, "reported": {"name": "H"}}, I2T, "one number for .*'name': 'H'.*, found 0"),
        ({**BASE, "reported": None}, I2T, "row 'CLIP, base' has no reported numbers"),
    ],
)
def test_what_does_not_match_is_named(tmp_path, row, column, said):
    with pytest.raises(ValueError, match=said):
        checked(tmp_path, [row], [column])


@pytest.fixture(scope="module")
def paper() -> dict:
    """All values of the paper's study."""
    return include.whole(yaml.safe_load((ROOT / "config/paper.yaml").read_text()), ROOT)


def test_the_baselines_of_the_paper_are_checked_under_their_own_names(paper):
    """The published numbers of a row belong to the weights that its run loads."""
    study = load(paper, "paper.yaml", ROOT)
    for row in study.tables["sanity"].rows:
        run = study.runs[str(row.run)]
        assert isinstance(run, PretrainedRun)
        assert row.reported is not None
        name, tag = row.reported["name"], row.reported["tag"]
        # The names with -quickgelu are those that open_clip's table has without it.
        assert (run.tower.name.removesuffix("-quickgelu"), run.tower.tag) == (name, tag)
    languages = study.tables["sanity"].columns[-1].measures
    assert len({study.benchmarks[measure.benchmark].language for measure in languages}) == 36


def test_only_the_papers_baselines_are_needed_for_the_check(paper):
    study = load(paper, "paper.yaml", ROOT)
    runs = {result.split("/")[1] for result in study.table_comparison("sanity")[1]}
    assert len(runs) == 5
    assert not any(study.trained(run) for run in runs)
    assert "sanity" not in load_file(ROOT / "config/config.yaml", ROOT).tables


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        ("rows", "run", "clip-wit", "unknown run 'clip-wit' (did you mean 'clip-wit400m'?); known"),
        ("columns", "benchmark", "COCO", "unknown benchmark 'COCO' (did you mean 'MSCOCO'?); kn"),
        (
            "columns",
            "metric",
            "i2t_r@2",
            "tables.sanity.rows.4.reported: 'config/reported/sanity.csv' has no number for "
            "'MSCOCO i2t_r@2' (did you mean 'MSCOCO i2t_r@",
        ),
        (
            "rows",
            "reported",
            {"name": "ViT-H-14"},
            "'config/reported/sanity.csv' has no rows with {'name': 'ViT-H-14'}",
        ),
        ("rows", "reported", None, "row 'CLIP, ViT-B/16' has no reported numbers"),
    ],
)
def test_a_bad_check_is_told_before_anything_runs(paper, place, key, value, said):
    changed = copy.deepcopy(paper)
    changed["tables"]["sanity"][place][0][key] = value
    with pytest.raises(StudyError) as error:
        load(changed, "paper.yaml", ROOT)
    assert said in str(error.value)
