"""Every cell of a study finds exactly one of the paper's numbers."""

from pathlib import Path

import polars as pl
import pytest

from flame.report.reported import number, read
from flame.report.results import Results
from flame.report.results_table import cell
from flame.study.load import load_file
from flame.study.schema.tables import Reported

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "config" / "reported").glob("*.csv"))
NUMBERS = [path for path in FILES if path.stem.startswith(("table", "figure", "sanity"))]
NUMBERS = [path for path in NUMBERS if path.stem not in {"table_a1", "table_a2"}]
ROWS = pl.DataFrame(
    {
        "prompts": ["1", "7", "7", "9", "9"],
        "value": ["35.7", "43.3", "43.3", "41.6", "+1.0"],
    }
)


def test_a_number_is_that_of_the_rows_that_match():
    assert number(ROWS, "f", {"prompts": 1}) == 35.7
    assert number(ROWS, "f", {"prompts": 7}) == 43.3  # twice the same
    assert number(ROWS, "f", {"prompts": 9, "value": "+1.0"}) == 1.0
    empty = ROWS.with_columns(value=pl.lit(None, dtype=pl.String))
    assert number(empty, "f", {"prompts": 1}) is None


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"prompts": 3}, "f: expected one number for {'prompts': 3}, found 0"),
        ({"prompts": 9}, "f: expected one number for {'prompts': 9}, found 2"),
        ({"prompt": 9}, r"f: no column 'prompt' \(did you mean 'prompts'\?\); known: prompts"),
    ],
)
def test_what_is_not_one_number_is_named(wanted, said):
    with pytest.raises(ValueError, match=said):
        number(ROWS, "f", wanted)


def test_a_match_without_rows_is_refused():
    reported = Reported(file="table6.csv", match={"method": "BLIP"})
    with pytest.raises(ValueError, match=r"table6\.csv: no rows match {'method': 'BLIP'}"):
        read(ROOT / "config" / "reported" / "table6.csv", reported)


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: path.stem)
def test_every_value_is_a_number_and_no_cell_has_two(path):
    frame = pl.read_csv(path, infer_schema=False)
    frame["value"].cast(pl.Float64)  # "+19.0" too; fails of a text
    cells = frame.group_by(frame.columns[: frame.columns.index("value")])
    assert cells.agg(pl.col("value").n_unique())["value"].max() == 1


@pytest.mark.parametrize(
    "config",
    [
        "config/config.yaml",
        "config/paper.yaml",
        "tests/config/tiny.yaml",
        "tests/config/whole.yaml",
    ],
)
def test_every_column_of_a_study_finds_its_numbers(config):
    """A wrong name would otherwise show only after all computation, as an error or empty cells."""
    study = load_file(ROOT / config, ROOT)
    nothing = Results({}, {})
    empty = []
    for name, table in study.tables.items():
        if table.reported is None:  # ours, not the paper's
            continue
        printed = read(ROOT / table.reported.file, table.reported)
        rows = [row.model_copy(update={"run": None}) for row in table.rows]
        for column in table.columns:
            found = [cell(nothing, printed, table, row, column).paper for row in rows]
            if not any(value is not None for value in found):
                empty.append(f"{name}: {column.benchmark} {column.metric}")
    assert not empty
