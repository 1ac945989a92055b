"""Metrics of runs -> what the paper says, one claim a line, and whether it holds here."""

from collections import Counter
from pathlib import Path

import polars as pl

from flame.report import verdicts
from flame.report.results import read
from flame.runtime import command
from flame.runtime.checksums import read_json
from flame.runtime.resumable import write_atomic
from flame.study.settings import ClaimsSettings

PREAMBLE = """\
# Claims of the paper in the *{study}* study

What FLAME (arXiv 2411.11927) says, held against what the *{study}* study measured. {total} claims;
**holds: {holds}**, **does not hold: {fails}**, **cannot be tested here: {untested}**. In brackets,
behind each benchmark of the paper, the data set that was measured for it; where it is another one,
only the sign of a difference is comparable with the paper's, not its size.

A claim **holds** if the whole 95 % interval lies above 0 (or above the ratio that is claimed), not
its value alone. Otherwise it **does not hold**, and the last column says which way: the interval is
wholly below 0, so the opposite was found, or it contains 0, so these queries do not decide it.
Differences are in points, on the same queries for both runs, and the bootstrap draws the same for
both. Its interval tells what other queries would change, not what another training would{seeds}.
A ratio of times has, in place of the interval, its range over the rounds of the measurement.
"""
SEEDS = (
    "; for\nthat, ± is the standard deviation over the seeds, where both runs have as many of them"
)


def claims(
    metrics: list[Path],
    hits: list[Path],
    csv: Path,
    markdown: Path,
    settings: ClaimsSettings,
    overhead: Path | None = None,
) -> None:
    """Hold every claim of the paper against what was measured.

    Args:
        metrics: JSON files of the evaluate and few-shot stages.
        hits: the Parquet file beside each of them.
        csv: CSV to write, one line a claim.
        markdown: the same, to be read.
        settings: the claims.
        overhead: JSON of the overhead stage, for claims about time.
    """
    results = read(metrics, hits, settings.runs, settings.bootstrap)
    ratios = read_json(overhead)["ratios"] if overhead is not None else {}
    judged = [verdicts.judge(claim, results, ratios) for claim in settings.claims]
    table = pl.DataFrame(verdicts.as_records(judged), infer_schema_length=None)
    counts = Counter(verdict.word for verdict in judged)
    several = any(len(names) > 1 for names in settings.runs.values())
    holds, fails, untested = (counts[word] for word in verdicts.WORDS)
    preamble = PREAMBLE.format(
        study=settings.study,
        total=len(judged),
        holds=holds,
        fails=fails,
        untested=untested,
        seeds=SEEDS if several else "",
    )
    text = f"{preamble}\n{verdicts.as_markdown(judged, settings.datasets)}"
    write_atomic(csv, table.write_csv(float_precision=2).encode())
    write_atomic(markdown, text.encode())


if __name__ == "__main__":
    command.main(claims)
