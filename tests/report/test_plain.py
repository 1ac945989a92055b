"""A CSV of results, as it is read in a terminal."""

import polars as pl

from flame.report.plain import plain_table


def test_each_interval_stands_beside_its_value():
    frame = pl.DataFrame(
        {
            "prompts": ["1", "7"],
            "COCO r@1 [scenes]": ["4.2", "12.5"],
            "COCO r@1 95% low": ["0.0", "8.1"],
            "COCO r@1 95% high": ["12.5", "16.0"],
            "COCO r@1 std": [None, "0.3"],
            "COCO r@1 paper": ["35.7", None],
        }
    )
    assert plain_table(frame).splitlines() == [
        "prompts         COCO r@1 [scenes]  COCO r@1 paper",
        "-------  ------------------------  --------------",
        "      1         4.2 (0.0 to 12.5)            35.7",
        "      7  12.5 ± 0.3 (8.1 to 16.0)",
    ]


def test_a_wide_table_is_transposed():
    frame = pl.DataFrame({"prompts": ["1"], **{f"set {n} top1": [f"{n}.0"] for n in range(9)}})
    lines = plain_table(frame).splitlines()
    assert lines[:3] == ["prompts       1", "----------  ---", "set 0 top1  0.0"]
    assert len(lines) == 11


def test_long_texts_wrap():
    claim = "Seven prompts beat one prompt on captions that are long."
    frame = pl.DataFrame({"claim": [claim, "Others."] * 2, "value": ["+1.0", "-2.5"] * 2})
    assert plain_table(frame).splitlines()[1:5] == [
        "--------------------------------  -----",
        "Seven prompts beat one prompt on   +1.0",
        "captions that are long.",
        "Others.                            -2.5",
    ]
