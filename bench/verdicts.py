"""Compare the verdicts of two runs of a study, with other seeds or on another machine.

    python bench/verdicts.py results/claims.csv elsewhere/results/claims.csv

Prints both intervals of every claim, then each verdict that changed. Exits with 1 if a claim
*holds* in one list and is *contradicted* in the other, or is in one list only.
"""

import argparse
import sys
from pathlib import Path

import polars as pl

REVERSED = {"holds", "contradicted"}
KEYS = ["claim", "where"]


def compare(first: Path, second: Path) -> bool:
    """Print the comparison; whether both lists have the same claims and no verdict is reversed.

    Args:
        first: `claims.csv` of a study.
        second: the same of another run of it.
    """
    sides = [pl.read_csv(path, infer_schema_length=None) for path in (first, second)]
    for path, side in zip((first, second), sides, strict=True):
        twice = side.filter(side.select(KEYS).is_duplicated())
        if not twice.is_empty():
            raise ValueError(f"{path}: claim {twice['claim'][0]!r} occurs twice")
    both = sides[0].join(sides[1], on=KEYS, how="full", coalesce=True, suffix="_second")
    alone = both.filter(pl.col("verdict").is_null() | pl.col("verdict_second").is_null())
    shared = both.join(alone, on=KEYS, how="anti")
    for row in shared.iter_rows(named=True):
        print(f"{told(row, '')} | {told(row, '_second')} | {row['claim']}")
    changed = shared.filter(pl.col("verdict") != pl.col("verdict_second"))
    print(f"\n{changed.height} of {shared.height} verdicts changed")
    opposite = 0
    for row in changed.iter_rows(named=True):
        is_reversed = {row["verdict"], row["verdict_second"]} == REVERSED
        opposite += is_reversed
        mark = "REVERSED: " if is_reversed else ""
        print(f"- {mark}{row['verdict']} -> {row['verdict_second']}: {row['claim']}")
    for claim in alone["claim"]:
        print(f"- in one list only: {claim}")
    return not opposite and alone.is_empty()


def told(row: dict, suffix: str) -> str:
    """Value, interval and verdict of one side, in a fixed width."""
    value, low, high = (row[name + suffix] for name in ("value", "low", "high"))
    numbers = "" if value is None else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"{numbers:>24} {row['verdict' + suffix]:>21}"


def main() -> None:
    """Compare two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    sys.exit(0 if compare(args.first, args.second) else 1)


if __name__ == "__main__":
    main()
