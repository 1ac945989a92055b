"""A table holds the measured numbers with their intervals, and the paper's numbers."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError
from scipy import stats

from flame.study.schema.tables import Claim, Measure, Table
from flame.study.settings import Compared, TableSettings
from flame.table import COMMANDS, fill_table
from tests.answers import counted, write

SRC = Path(__file__).parents[1] / "src"
# The model with 7 prompts occurs twice, as in Table 7.
REPORTED = """\
table,method,prompts,benchmark,metric,value,note
Table 6,FLAME,1,COCO,i2t_r@1,35.7,"a, note"
Table 6,FLAME,7,COCO,i2t_r@1,43.3,
Table 6,FLAME,7,COCO,i2t_r@1,43.3,
Table 6,FLAME,7,COCO,i2t_r@1_gain_over_clip,+20.0,
Table 6,FLAME,1,COCO,t2i_r@1,23.7,
Table 6,FLAME,7,COCO,t2i_r@1,28.6,
Table 6,FLAME,1,average,average,38.5,
Table 6,FLAME,7,average,average,,
Table 6,SLIP,0,COCO,i2t_r@1,44.0,
Table 6,SLIP,0,COCO,t2i_r@1,20.0,
Table 6,SLIP,0,average,average,31.0,
Table 7,FLAME,9,COCO,i2t_r@1,41.6,
"""
MEASURED = {
    "one": {
        "COCO": {"i2t_r@1": counted(10, 40), "t2i_r@1": counted(90, 200)},
        "food": {"top1": counted(30, 60)},
        "tints": {"top1": counted(40, 50)},
    },
    "seven": {
        "COCO": {"i2t_r@1": counted(16, 40), "t2i_r@1": counted(80, 200)},
        "food": {"top1": counted(36, 60)},
        "tints": {"top1": counted(45, 50)},
    },
    "seven.seed1": {
        "COCO": {"i2t_r@1": counted(20, 40), "t2i_r@1": counted(80, 200)},
        "food": {"top1": counted(36, 60)},
        "tints": {"top1": counted(45, 50)},
    },
}
ONE = {"label": "1", "run": "one", "reported": {"prompts": 1}}
SEVEN = {"label": "7", "run": "seven", "reported": {"prompts": 7}}
SLIP = {"label": "SLIP", "reported": {"method": "SLIP"}}
I2T, T2I = {"benchmark": "COCO", "metric": "i2t_r@1"}, {"benchmark": "COCO", "metric": "t2i_r@1"}
MEAN = {
    "benchmark": "average",
    "metric": "top1",
    "mean_of": ["food", "tints"],
    "reported_metric": "average",
}


def interval(values) -> tuple[float, float]:
    """95 % interval of a mean in percent, by scipy."""
    found = stats.ttest_1samp(100 * np.array(values), 0).confidence_interval()
    return found.low, found.high


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, Path]]:
    """Results of three trainings, in the same folder as reported.csv."""
    (tmp_path / "reported.csv").write_text(REPORTED)
    return [write(tmp_path, run, answers) for run, answers in MEASURED.items()]


def fill(
    files,
    rows,
    columns,
    match=None,
    *,
    seeds: int = 1,
    claims=(),
    method=None,
    reported="reported.csv",
) -> tuple[str, str]:
    folder = files[0][0].parent
    csv, markdown = (folder / name for name in ("t.csv", "t.md"))
    file = None if reported is None else folder / reported
    values = {
        "title": "Table 6: prompts.",
        "row_header": "prompts",
        "rows": rows,
        "columns": columns,
        "reported": file and {"file": str(file), "match": match or {"table": "Table 6"}},
    }
    settings = TableSettings(
        study="tiny",
        name="table6",
        table=Table.model_validate(values),
        datasets={"COCO": "scenes-short", "food": "scenes-food", "tints": "scenes-tints"},
        stand_ins=("COCO", "food", "tints"),
        runs={
            "one": Compared(trainings=("one",), method=method, drawn=False),
            "seven": Compared(
                trainings=("seven", "seven.seed1")[:seeds], method=method, drawn=False
            ),
        },
        claims=claims,
        version=1,
    )
    fill_table([f[0] for f in files], [f[1] for f in files], csv, markdown, settings, file)
    return csv.read_text(), markdown.read_text()


def lines_of(markdown: str) -> list[list[str]]:
    """Cells of the table's lines."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in rows]


def test_csv_has_value_interval_and_reported_number_of_each_column(files):
    csv = pl.read_csv(StringIO(fill(files, [ONE, SEVEN], [I2T, T2I, MEAN])[0]))
    assert csv.columns[:5] == [
        "prompts",
        "scenes-short (for COCO) i2t_r@1",
        "scenes-short (for COCO) i2t_r@1 95% low",
        "scenes-short (for COCO) i2t_r@1 95% high",
        "COCO i2t_r@1 paper",
    ]
    assert len(csv.columns) == 1 + 3 * 4
    low, high = interval(counted(10, 40))
    assert csv.row(0)[:5] == (1, 25.0, round(low, 1), round(high, 1), 35.7)
    assert csv["scenes-short (for COCO) t2i_r@1"].to_list() == [45.0, 40.0]


def test_a_table_of_our_own_has_no_numbers_of_the_paper(files):
    rows = [{key: value for key, value in row.items() if key != "reported"} for row in (ONE, SEVEN)]
    csv, markdown = fill(files, rows, [I2T], reported=None)
    name = "scenes-short (for COCO) i2t_r@1"
    assert pl.read_csv(StringIO(csv)).columns == [
        *("prompts", name, f"{name} 95% low", f"{name} 95% high")
    ]
    assert "paper" not in markdown
    with pytest.raises(ValidationError, match="the table names no file of reported numbers"):
        fill(files, [{**ONE, "reported": {"prompts": 1}}], [I2T], reported=None)


def test_mean_of_benchmarks_is_unweighted_and_so_is_its_interval(files):
    csv = pl.read_csv(StringIO(fill(files, [ONE, SEVEN], [MEAN])[0]))
    name = "scenes-food and scenes-tints (for average) top1"
    assert csv[name].to_list() == [65.0, 75.0]
    first, second = (np.array(counted(*c)) for c in ((30, 60), (40, 50)))
    welch = stats.ttest_ind(50 * first, -50 * second, equal_var=False).confidence_interval()
    assert csv[f"{name} 95% low"][0] == round(welch.low, 1)
    assert csv[f"{name} 95% high"][0] == round(welch.high, 1)
    assert csv["average top1 paper"].to_list() == [38.5, None]


def test_a_mean_may_be_of_several_metrics(files):
    both = {**MEAN, "mean_of": [I2T, {"benchmark": "food", "metric": "top1"}]}
    csv, markdown = fill(files, [ONE], [both])
    name = "scenes-short and scenes-food (for average)"
    assert pl.read_csv(StringIO(csv))[f"{name} top1"].item() == 37.5
    members = "scenes-short (for COCO) I2T R@1, scenes-food (for food) top-1."
    assert f"- *{name}*: mean of {members}" in " ".join(markdown.split())


def test_markdown_reads_as_the_paper(files):
    markdown = fill(files, [ONE, SEVEN], [I2T, T2I, MEAN])[1]
    assert markdown.startswith(
        "**Table 6: prompts.**\n\nResults of the *tiny* study, in percent.\n"
        "*scenes-short (for COCO)*: measured on scenes-short, which stands in for COCO.\n"
    )
    lines = lines_of(markdown)
    assert lines[:3] == [
        ["prompts", "scenes-short (for COCO)", "", "scenes-food and scenes-tints (for average)"],
        ["---", "---:", "---:", "---:"],
        ["", "I2T R@1", "T2I R@1", "top-1"],
    ]
    low, high = interval(counted(10, 40))
    assert lines[3][:2] == ["**1**", f"25.0<br><sub>{low:.1f}-{high:.1f}</sub>"]
    assert lines[3][2].startswith("**45.0**<br><sub>")
    assert lines[4] == [
        "<sub>paper</sub>",
        "<sub>35.7</sub>",
        "<sub>23.7</sub>",
        "<sub>**38.5**</sub>",
    ]
    assert lines[6] == ["<sub>paper</sub>", "<sub>**43.3**</sub>", "<sub>**28.6**</sub>", ""]
    last = "- *scenes-food and scenes-tints (for average)*: mean of "
    assert last + "scenes-food (for food), scenes-tints (for tints)." in " ".join(markdown.split())
    assert "±" not in markdown
    assert "gain" not in markdown


def test_several_seeds_show_mean_and_deviation(files):
    csv, markdown = fill(files, [ONE, SEVEN], [I2T], seeds=2)
    column = pl.read_csv(StringIO(csv))["scenes-short (for COCO) i2t_r@1 std"]
    assert column.to_list() == [None, 7.1]  # of 40, 50 %
    assert lines_of(markdown)[3][1].startswith("25.0<br>")
    assert lines_of(markdown)[5][1].startswith("**45.0** ± 7.1<br>")
    assert "standard deviation" in markdown


def test_a_run_that_is_trained_once_and_has_no_others_to_learn_from_is_marked(files):
    alone = fill(files, [ONE, SEVEN], [I2T], method="flame")[1]
    assert re.search(r"25\.0<br><sub>[\d.]+-[\d.]+†</sub>", alone)
    assert "\n- †: too few trainings of its kind" in alone
    assert "†" not in fill(files, [ONE, SEVEN], [I2T])[1]  # towers that were not trained here


def test_rows_of_other_methods_are_marked_and_compete_with_the_papers_numbers_only(files):
    csv, markdown = fill(files, [SLIP, SEVEN], [I2T, T2I])
    lines = lines_of(markdown)
    assert lines[3] == ["SLIP <sub>(reported)</sub>", "<sub>**44.0**</sub>", "<sub>20.0</sub>"]
    assert lines[4][1].startswith("**40.0**")
    assert lines[5][1:] == ["<sub>43.3</sub>", "<sub>**28.6**</sub>"]
    row = pl.read_csv(StringIO(csv)).row(0)
    assert row == ("SLIP", None, None, None, 44.0, None, None, None, 20.0)


def test_a_row_that_the_paper_does_not_have_is_one_line(files):
    ours = {"label": "ours", "run": "one"}
    csv, markdown = fill(files, [ours, SEVEN], [I2T])
    assert [line[0] for line in lines_of(markdown)[3:]] == ["**ours**", "**7**", "<sub>paper</sub>"]
    assert pl.read_csv(StringIO(csv))["COCO i2t_r@1 paper"].to_list() == [None, 43.3]


def test_gains_stand_in_parentheses_with_their_paired_interval(files):
    csv, markdown = fill(files, [ONE, {**SEVEN, "gain_over": "one"}], [I2T])
    table = pl.read_csv(StringIO(csv))
    low, high = interval(counted(6, 40))
    assert table["scenes-short (for COCO) i2t_r@1 gain"].to_list() == [None, 15.0]
    assert table["scenes-short (for COCO) i2t_r@1 gain 95% low"][1] == round(low, 1)
    assert table["COCO i2t_r@1 gain paper"].to_list() == [None, 20.0]
    lines = lines_of(markdown)
    assert lines[5][1].startswith("**40.0** (+15.0)<br><sub>")
    assert lines[5][1].endswith(f" ({low:+.1f} to {high:+.1f})</sub>")
    assert lines[6][1] == "<sub>**43.3** (+20.0)</sub>"


def test_a_gain_that_the_paper_does_not_print_is_measured_only(files):
    csv, markdown = fill(files, [ONE | {"gain_over": "seven"}, SEVEN], [I2T])
    table = pl.read_csv(StringIO(csv))
    assert table["scenes-short (for COCO) i2t_r@1 gain"].to_list() == [-15.0, None]
    assert table["COCO i2t_r@1 gain paper"].to_list() == [None, None]
    assert lines_of(markdown)[4][1] == "<sub>35.7</sub>"


def test_a_column_that_the_paper_does_not_have_is_measured_only(files):
    own = {"benchmark": "food", "metric": "top1"}
    csv, markdown = fill(files, [ONE, SLIP], [I2T, own])
    assert pl.read_csv(StringIO(csv))["food top1 paper"].to_list() == [None, None]
    assert lines_of(markdown)[4] == ["<sub>paper</sub>", "<sub>35.7</sub>", ""]


def test_claims_stand_under_the_table(files):
    claim = Claim(
        text="Seven are better than one.",
        where="Section 4.4",
        table="table6",
        better="seven",
        worse="one",
        measures=(Measure(**I2T),),
        reported=7.6,
    )
    markdown = fill(files, [ONE, SEVEN], [I2T], claims=(claim,))[1]
    head, rule, line = lines_of(markdown.split("**Claims**")[1])
    assert len(head) == len(rule) == len(line)
    compared = "seven vs. one: scenes-short (for COCO)"
    assert line[0].startswith(f"Seven are better than one.<br><sub>{compared}")
    assert line[1:3] == ["Section 4.4", "+7.6"]
    assert line[3].startswith("+15.0<br>")
    assert line[4].startswith("**holds**")
    assert "Claims" not in fill(files, [ONE], [I2T])[1]


def test_same_inputs_give_the_same_bytes(files):
    rows, columns = [ONE, SEVEN, SLIP], [I2T, MEAN]
    assert fill(files, rows, columns) == fill(files[::-1], rows, columns)


@pytest.mark.parametrize(
    ("row", "column", "match", "said"),
    [
        ({**ONE, "run": "three"}, I2T, None, "no trainings of run 'three'; known: one, seven"),
        (ONE, {"benchmark": "COCO", "metric": "r@1"}, None, "has no metric 'r@1' .*known: i2t_r@1"),
        ({**ONE, "reported": {}}, I2T, None, "expected one number for .*'COCO'.*, found 3"),
        ({**ONE, "reported": {"prompts": 3}}, I2T, None, "number for .*'prompts': 3.*, found 0"),
        ({**ONE, "reported": {"promts": 1}}, I2T, None, r"'promts' \(did you mean 'prompts'\?\)"),
        (ONE, I2T, {"table": "Table 5"}, "no rows match {'table': 'Table 5'}"),
        (ONE, I2T, {"tabel": "Table 6"}, r"no column 'tabel' \(did you mean 'table'\?\)"),
    ],
)
def test_what_does_not_match_is_named(files, row, column, match, said):
    with pytest.raises(ValueError, match=said):
        fill(files, [row], [column], match)


def table_command(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flame.table", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_table_is_shown_as_plain_text(files):
    fill(files, [ONE, SEVEN], [I2T])
    csv = files[0][0].with_name("t.csv")
    done = table_command("show", csv, "--columns", "prompts", "COCO i2t_r@1 paper")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "prompts  COCO i2t_r@1 paper",
        "-------  ------------------",
        "      1                35.7",
        "      7                43.3",
    ]


def test_an_unknown_column_is_named(files):
    fill(files, [ONE], [I2T])
    done = table_command("show", files[0][0].with_name("t.csv"), "--columns", "prompt")
    assert done.returncode == 1
    assert "t.csv: no column 'prompt' (did you mean 'prompts'?)" in done.stderr


def test_the_subcommands_are_those_that_the_rules_call():
    rules = (SRC.parent / "workflow/rules/paper.smk").read_text()
    called = re.findall(r"flame\.table (\w+)", rules)
    assert sorted(called) == sorted(set(COMMANDS) - {"show"})


def test_chance_is_a_row_and_marks_the_intervals_that_contain_it(files):
    columns = [I2T | {"chance": 25.0}, T2I | {"chance": 20.0}]
    csv, markdown = fill(files, [ONE], columns)
    assert pl.read_csv(StringIO(csv))["COCO i2t_r@1 chance"].to_list() == [25.0]
    lines = lines_of(markdown)
    assert lines[-1] == ["<sub>chance</sub>", "<sub>25.0</sub>", "<sub>20.0</sub>"]
    assert re.match(r"\*\*25\.0\*\*<br><sub>[\d.-]+†?°</sub>", lines[3][1])
    assert "°" not in lines[3][2]  # 45 %
    assert "°: the interval contains chance." in markdown
    assert "No interval contains chance." in fill(files, [ONE], columns[1:])[1]
    assert "chance<" not in fill(files, [ONE], [I2T])[1]
