"""A CSV of results, as it is read in a terminal."""

import polars as pl

from flame.report.plain import plain_table

NAME = "scenes (for COCO) r@1"


def test_each_interval_stands_below_its_value_and_the_papers_number_beside_it():
    frame = pl.DataFrame(
        {
            "prompts": ["1", "7"],
            NAME: ["4.2", "12.5"],
            f"{NAME} 95% low": ["0.0", "8.1"],
            f"{NAME} 95% high": ["12.5", "16.0"],
            f"{NAME} std": [None, "0.3"],
            "COCO r@1 paper": ["35.7", None],
        }
    )
    assert plain_table(frame).splitlines() == [
        "prompts  scenes (for COCO) r@1    paper",
        "-------  ---------------------  -------",
        "      1                    4.2     35.7",
        "                   0.0 to 12.5",
        "      7             12.5 ± 0.3",
        "                   8.1 to 16.0",
    ]


def test_a_wide_table_is_transposed():
    sets = {f"set {n} top1": [f"{n}.0"] * 2 for n in range(9)}
    frame = pl.DataFrame({"prompts": ["1"] * 2, **sets})
    lines = plain_table(frame, 80).splitlines()
    assert lines[:3] == ["prompts       1    1", "----------  ---  ---", "set 0 top1  0.0  0.0"]
    assert len(lines) == 11


def test_texts_wrap_between_words_until_all_columns_fit():
    claim = "Seven prompts beat one prompt on captions that are long."
    where = "10 stand-ins (for average of 10 downstream sets)"
    frame = pl.DataFrame(
        {"claim": [claim, "Others."], "in": [where] * 2, "value": ["+1.0", "-2.5"]}
    )
    lines = plain_table(frame, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(lines[2].split()) == "Seven prompts beat one 10 stand-ins (for average +1.0"
    words = {word for line in lines[2:] for word in line.split()}
    assert words == {*claim.split(), *where.split(), "Others.", "+1.0", "-2.5"}


def test_a_word_that_is_too_long_stays_whole():
    word = "+".join(["animals"] * 20)
    assert word in plain_table(pl.DataFrame({"claim": [f"of {word}"], "value": ["1.0"]}), 60)


def test_the_interval_of_a_claim_is_in_columns_of_its_own_name():
    frame = pl.DataFrame({"claim": ["c"], "value": ["2.5"], "low": ["1.0"], "high": ["4.0"]})
    assert plain_table(frame).splitlines()[2:] == [
        "c             2.5",
        "       1.0 to 4.0",
    ]
