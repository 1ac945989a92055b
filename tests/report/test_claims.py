"""A claim holds, or is contradicted, only if its whole interval lies on one side of the bound."""

import json
import re

import polars as pl
import pytest

from flame.study.schema.tables import Claim, Measure
from flame.study.settings import ClaimsSettings, Compared
from flame.table import judge_claims
from tests.answers import counted, write

LONG = Measure(benchmark="S4V", metric="i2t_r@1")
RATES = {"good": 80, "bad": 20, "equal": 20}
RATIOS = {"ratios": {"slow/fast": {"value": 3.1, "low": 2.9, "high": 3.3}}}


def compare(better: str, worse: str, **more) -> Claim:
    text = f"{better} beats {worse}"
    return Claim(text=text, where="4.2", better=better, worse=worse, measures=(LONG,), **more)


def ratio(above: float) -> Claim:
    return Claim(text="is fast", where="Figure 5", ratio="slow/fast", above=above, reported=3.6)


UNTESTED = Claim(text="beats | mSigLIP", where="Figure 4", untested="no such model here")


def judge(
    folder, *judged: Claim, seeds: int = 1, method: str | None = None, overhead=RATIOS
) -> tuple[list[dict], str]:
    files, runs = [], {}
    for run, hits in RATES.items():
        trainings = tuple(f"{run}.seed{seed}" for seed in range(seeds))
        runs[run] = Compared(trainings=trainings, method=method, drawn=False)
        for seed, training in enumerate(trainings):
            hit = counted(hits + seed * (run == "good"), 100)
            if run == "equal":  # as many hits as `bad`, on other queries
                hit = hit[::-1]
            files.append(write(folder, training, {"S4V": {"i2t_r@1": hit}}))
    (folder / "overhead.json").write_text(json.dumps(overhead))
    settings = ClaimsSettings(
        study="tiny",
        claims=judged,
        datasets={"S4V": "scenes-long"},
        stand_ins=("S4V",),
        runs=runs,
        version=1,
    )
    csv, markdown = folder / "claims.csv", folder / "claims.md"
    metrics, hits = [f[0] for f in files], [f[1] for f in files]
    times = folder / "overhead.json" if overhead else None
    judge_claims(metrics, hits, csv, markdown, settings, times)
    return pl.read_csv(csv).to_dicts(), markdown.read_text()


@pytest.mark.parametrize(
    ("claim", "verdict", "because"),
    [
        (compare("good", "bad"), "holds", "the whole interval is above 0"),
        (compare("bad", "good"), "contradicted", "the whole interval is below 0"),
        (
            compare("equal", "bad"),
            "undecided",
            # 40 of 100 queries differ, by +1 or -1: (1.98 + 0.85) standard errors of 6.4 points
            "the interval contains 0; differences from 18.0 points on would have been found",
        ),
        (ratio(2.5), "holds", "the whole interval is above 2.5"),
        (ratio(3.0), "undecided", "the interval contains 3"),
        (ratio(3.6), "contradicted", "the whole interval is below 3.6"),
        (UNTESTED, "cannot be tested here", "no such model here"),
    ],
)
def test_verdicts(tmp_path, claim, verdict, because):
    (record,), markdown = judge(tmp_path, claim)
    assert (record["verdict"], record["because"]) == (verdict, because)
    assert f"| **{verdict}**: {because} |" in markdown


def test_differences_are_in_points_beside_the_papers(tmp_path):
    (record,), markdown = judge(tmp_path, compare("good", "bad", reported=14.8))
    assert (record["value"], record["paper"], record["std"]) == (60.0, 14.8, None)
    assert record["low"] < 60.0 < record["high"]
    assert record["measures"] == "scenes-long (for S4V) i2t_r@1"
    assert record["measured in"] == "scenes-long (for S4V) I2T R@1"
    compared = "good vs. bad: scenes-long (for S4V) I2T R@1"
    assert f"| good beats bad<br><sub>{compared}</sub> " in markdown
    assert re.search(r"\| \+14\.8 \| \+60\.0<br><sub>\+\d\d\.\d to \+\d\d\.\d</sub> \|", markdown)


def test_ratios_are_said_as_such(tmp_path):
    (record,), markdown = judge(tmp_path, ratio(1))
    assert (record["value"], record["low"], record["high"]) == (3.1, 2.9, 3.3)
    assert "| 3.6x | 3.1x<br><sub>2.90 to 3.30</sub> |" in markdown


def test_the_preamble_counts_the_verdicts_and_names_the_study(tmp_path):
    judged = compare("good", "bad"), compare("bad", "good"), compare("equal", "bad"), UNTESTED
    markdown = " ".join(judge(tmp_path, *judged)[1].split())
    assert "in the *tiny* study" in markdown
    counts = "**1 hold**, **1 are contradicted**, **1 are undecided**, **1 cannot be tested here**"
    assert f"4 claims: {counts}" in markdown


def test_without_replicated_trainings_there_is_no_verdict(tmp_path):
    """An interval over queries alone says nothing of another training."""
    (record,), markdown = judge(tmp_path, compare("good", "bad"), method="flame")
    assert (record["verdict"], record["value"]) == ("cannot be tested here", 60.0)
    assert "how much trainings differ is unknown" in markdown
    (record,), _ = judge(tmp_path, compare("good", "bad"), method="flame", seeds=2)
    assert record["verdict"] == "holds"


def test_seeds_show_how_far_the_trainings_lie_apart(tmp_path):
    (record,), markdown = judge(tmp_path, compare("good", "bad"), seeds=3)
    assert (record["value"], record["std"]) == (61.0, 1.0)  # of 60, 61, 62 points
    assert "+61.0 ± 1.0<br>" in markdown
    assert "standard deviation over the trainings" in " ".join(markdown.split())


def test_text_cannot_break_the_table(tmp_path):
    lines = [line for line in judge(tmp_path, UNTESTED)[1].splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_mean_of_many_benchmarks_is_named_by_its_ends(tmp_path):
    names = [f"set {n}" for n in range(6)]
    files = [
        write(tmp_path, run, {n: {"top1": counted(hits, 100)} for n in names})
        for run, hits in RATES.items()
    ]
    measures = tuple(Measure(benchmark=n, metric="top1") for n in names)
    claim = Claim(text="t", where="w", better="good", worse="bad", measures=measures)
    settings = ClaimsSettings(
        study="tiny",
        claims=(claim,),
        datasets=dict.fromkeys(names, "scenes"),
        runs={run: Compared(trainings=(run,), method=None, drawn=False) for run in ("good", "bad")},
        version=1,
    )
    out = tmp_path / "c.csv", tmp_path / "c.md"
    judge_claims([f[0] for f in files], [f[1] for f in files], *out, settings)
    assert "good vs. bad: mean of 6, from set 0 to set 5</sub>" in out[1].read_text()


def test_a_ratio_that_was_not_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match="claim 'is fast': no ratio 'slow/fast'; known: none"):
        judge(tmp_path, ratio(1), overhead={})
