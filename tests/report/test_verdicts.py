"""Verdicts of two runs of a study are compared claim by claim."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
FIRST = {"A": ("holds", 3.0), "B": ("undecided", 0.5), "C": ("cannot be tested here", None)}


def compare(folder, *lists) -> subprocess.CompletedProcess:
    paths = []
    for number, claims in enumerate(lists):
        rows = [
            {
                "claim": name,
                "where": "Table 1",
                "value": value,
                "low": None if value is None else value - 1,
                "high": None if value is None else value + 1,
                "verdict": verdict,
            }
            for name, (verdict, value) in claims.items()
        ]
        paths.append(folder / f"{number}.csv")
        pl.DataFrame(rows).write_csv(paths[-1])
    command = [sys.executable, str(ROOT / "bench/verdicts.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_same_verdicts_agree(tmp_path):
    done = compare(tmp_path, FIRST, FIRST)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 of 3 verdicts changed" in done.stdout
    assert "+3.0 (+2.0 to +4.0)" in done.stdout


@pytest.mark.parametrize(
    ("other", "said", "code"),
    [
        ({"A": ("undecided", 0.9)}, "- holds -> undecided: A", 0),
        ({"A": ("contradicted", -3.0)}, "- REVERSED: holds -> contradicted: A", 1),
        ({"B": ("contradicted", -3.0)}, "- undecided -> contradicted: B", 0),
        ({"D": ("holds", 3.0)}, "- in one list only: D", 1),
    ],
)
def test_changes_are_listed_and_only_a_reversed_verdict_or_a_missing_claim_fails(
    tmp_path, other, said, code
):
    done = compare(tmp_path, FIRST, FIRST | other)
    assert said in done.stdout
    assert done.returncode == code
