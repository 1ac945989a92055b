"""A table holds the measured numbers, their intervals, and the paper's beside them."""

import json
from io import StringIO
from pathlib import Path

import polars as pl
import pytest

from flame.bootstrap import interval
from flame.config import Bootstrap, Table, TableSettings
from flame.table import table

REPORTED = """\
table,prompts,benchmark,metric,value,note
Table 6,1,COCO,i2t_r@1,35.7,"a, note"
Table 6,7,COCO,i2t_r@1,43.3,
Table 6,1,COCO,t2i_r@1,23.7,
Table 6,7,COCO,t2i_r@1,28.6,
Table 6,1,average,average,38.5,
Table 6,7,average,average,,
"""
# run -> benchmark -> metric -> (hits, queries)
MEASURED = {
    "one": {
        "COCO": {"i2t_r@1": (10, 40), "t2i_r@1": (90, 200)},
        "food": {"top1": (30, 60)},
        "tints": {"top1": (40, 50)},
    },
    "seven": {
        "COCO": {"i2t_r@1": (16, 40), "t2i_r@1": (80, 200)},
        "food": {"top1": (36, 60)},
        "tints": {"top1": (45, 50)},
    },
}


@pytest.fixture
def study(tmp_path: Path):
    """Metrics files and settings of a table with two rows and three columns."""
    (tmp_path / "reported.csv").write_text(REPORTED)
    files = []
    for run, benchmarks in MEASURED.items():
        records = [
            {
                "run": run,
                "benchmark": name,
                "metrics": {m: {"hits": h, "queries": q} for m, (h, q) in metrics.items()},
            }
            for name, metrics in benchmarks.items()
        ]
        files.append(tmp_path / f"{run}.json")
        settings = {"bootstrap": Bootstrap().model_dump()}
        files[-1].write_text(json.dumps({"settings": settings, "records": records}))
    values = {
        "title": "Table 6: prompts.",
        "row_header": "prompts",
        "rows": [
            {"label": "1", "run": "one", "reported": {"prompts": 1}},
            {"label": "7", "run": "seven", "reported": {"prompts": 7}},
        ],
        "columns": [
            {"benchmark": "COCO", "metric": "i2t_r@1"},
            {"benchmark": "COCO", "metric": "t2i_r@1"},
            {
                "benchmark": "average",
                "metric": "top1",
                "mean_of": ["food", "tints"],
                "reported_metric": "average",
            },
        ],
        "reported": {"file": str(tmp_path / "reported.csv"), "match": {"table": "Table 6"}},
    }
    return files, values


def fill(files, values, folder: Path, **changes) -> tuple[str, str]:
    csv, markdown = folder / "t.csv", folder / "t.md"
    settings = TableSettings(
        study="tiny",
        name="table6",
        table=Table.model_validate(values | changes),
        datasets={"COCO": "scenes-short", "food": "scenes-food", "tints": "scenes-tints"},
        version=1,
    )
    table(files, settings.table.reported.file, csv, markdown, settings)
    return csv.read_text(), markdown.read_text()


def test_csv_has_value_interval_and_reported_number_of_each_column(study, tmp_path):
    csv = pl.read_csv(StringIO(fill(*study, tmp_path)[0]))
    assert csv.columns[:5] == [
        "prompts",
        "COCO i2t_r@1 [scenes-short]",
        "COCO i2t_r@1 95% low",
        "COCO i2t_r@1 95% high",
        "COCO i2t_r@1 paper",
    ]
    low, high = interval([10], [40], resamples=1000, seed=0)
    assert csv.row(0)[:5] == (1, 25.0, round(100 * low, 1), round(100 * high, 1), 35.7)
    assert csv["COCO t2i_r@1 [scenes-short]"].to_list() == [45.0, 40.0]


def test_mean_of_benchmarks_is_unweighted_and_so_is_its_interval(study, tmp_path):
    csv = pl.read_csv(StringIO(fill(*study, tmp_path)[0]))
    assert csv["average top1 [scenes-food+scenes-tints]"].to_list() == [65.0, 75.0]
    low, high = interval([30, 40], [60, 50], resamples=1000, seed=0)
    assert csv["average top1 95% low"][0] == round(100 * low, 1)
    assert csv["average top1 95% high"][0] == round(100 * high, 1)
    assert csv["average top1 paper"].to_list() == [38.5, None]


def test_markdown_reads_as_the_paper(study, tmp_path):
    title, _, *lines = fill(*study, tmp_path)[1].splitlines()
    assert title == "**Table 6: prompts.**"
    assert lines[:4] == [
        "| prompts | COCO |  | average |",
        "| --- | ---: | ---: | ---: |",
        "|  | *scenes-short* |  | *mean of 2 sets* |",
        "|  | I2T R@1 | T2I R@1 | top-1 |",
    ]
    assert lines[4].startswith("| **1** | 25.0<br><sub>")
    assert "| **45.0**<br><sub>" in lines[4]
    assert lines[5] == (
        "| <sub>paper</sub> | <sub>35.7</sub> | <sub>23.7</sub> | <sub>**38.5**</sub> |"
    )
    assert (
        lines[7] == "| <sub>paper</sub> | <sub>**43.3**</sub> | <sub>**28.6**</sub> | <sub></sub> |"
    )
    assert "*tiny* study" in "\n".join(lines)
    assert lines[-1] == "*average*: mean of scenes-food, scenes-tints."


def test_same_inputs_give_the_same_bytes(study, tmp_path):
    files, values = study
    assert fill(files, values, tmp_path) == fill(files[::-1], values, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [{"label": "3", "run": "three"}]}, r"benchmark \('three', 'COCO'\)"),
        (
            {"columns": [{"benchmark": "COCO", "metric": "top1"}]},
            "no metric 'top1'; known: i2t_r@1",
        ),
        ({"rows": [{"label": "7", "run": "seven"}]}, "2 rows, not one, have .*'COCO'"),
        (
            {"rows": [{"label": "3", "run": "one", "reported": {"prompts": 3}}]},
            "0 rows, not one, have .*'prompts': 3",
        ),
        (
            {"rows": [{"label": "1", "run": "one", "reported": {"promts": 1}}]},
            r"no column 'promts' \(did you mean 'prompts'\?\)",
        ),
    ],
)
def test_what_does_not_match_is_named(study, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        fill(*study, tmp_path, **change)
