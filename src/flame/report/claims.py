"""Claims of the paper -> what was measured of them, and whether they hold."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

from flame.report.markdown import markdown_table, metric_name
from flame.report.results import Estimate, Results
from flame.runtime.errors import known
from flame.study.schema.tables import Claim
from flame.study.settings import ClaimsSettings

Word = Literal["holds", "does not hold", "cannot be tested here"]
MOST_NAMED = 4  # benchmarks of a claim; of more, their number and the first and last
WORDS: tuple[Word, ...] = ("holds", "does not hold", "cannot be tested here")
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


class Verdict(NamedTuple):
    """What came out for a claim."""

    claim: Claim
    measured: Estimate | None
    """Difference in points, or ratio; None where it cannot be tested."""
    word: Word
    because: str
    """Where the interval lies, or why there is none."""


def judge(claim: Claim, results: Results, ratios: Mapping[str, Mapping[str, float]]) -> Verdict:
    """Hold a claim against what was measured.

    A claim holds if its whole interval, not only its value, lies above 0, or above the ratio that
    is claimed.

    Args:
        claim: two runs and what they are compared in, a ratio, or a reason.
        results: answers of the runs.
        ratios: name -> value, low, high, as the stage `overhead` measured them.
    """
    if claim.untested is not None:
        return Verdict(claim, None, "cannot be tested here", claim.untested)
    if claim.ratio is not None:
        if claim.ratio not in ratios:
            raise ValueError(f"no ratio {known(claim.ratio, ratios)} for claim {claim.text!r}")
        found = ratios[claim.ratio]
        measured = Estimate(found["value"], found["low"], found["high"])
    else:
        assert claim.better is not None
        assert claim.worse is not None
        measured = results.difference(claim.better, claim.worse, claim.measures)
    bound = claim.above or 0.0
    if measured.low > bound:
        return Verdict(claim, measured, "holds", f"the interval is wholly above {bound:g}")
    where = "is wholly below" if measured.high < bound else "contains"
    return Verdict(claim, measured, "does not hold", f"the interval {where} {bound:g}")


def as_csv(verdicts: Iterable[Verdict]) -> str:
    """One line per claim; differences in points, ratios as they are."""
    records = [_record(verdict) for verdict in verdicts]
    return pl.DataFrame(records, infer_schema_length=None).write_csv(float_precision=2)


def as_markdown(verdicts: Sequence[Verdict], settings: ClaimsSettings) -> str:
    """All claims with their verdicts, under a summary and the rules of the verdicts."""
    counts = Counter(verdict.word for verdict in verdicts)
    holds, fails, untested = (counts[word] for word in WORDS)
    several = any(len(names) > 1 for names in settings.runs.values())
    preamble = PREAMBLE.format(
        study=settings.study,
        total=len(verdicts),
        holds=holds,
        fails=fails,
        untested=untested,
        seeds=SEEDS if several else "",
    )
    return f"{preamble}\n{claims_table(verdicts, settings.datasets)}"


def claims_table(verdicts: Iterable[Verdict], datasets: Mapping[str, str]) -> str:
    """Markdown table with one line per claim.

    Args:
        verdicts: of each claim.
        datasets: benchmark -> data set that was measured for it.
    """
    head = ["claim", "where", "paper", "measured", "verdict"]
    rule = ["---", "---", "---:", "---:", "---"]
    lines = [_line(verdict, datasets) for verdict in verdicts]
    return markdown_table([head, rule, *lines])


def _record(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "claim": claim.text,
        "where": claim.where,
        "better": claim.better,
        "worse": claim.worse,
        "measures": "; ".join(f"{m.benchmark} {m.metric}" for m in claim.measures),
        "ratio": claim.ratio,
        "paper": claim.reported,
        **{key: getattr(verdict.measured, key, None) for key in Estimate._fields},
        "verdict": verdict.word,
        "because": verdict.because,
    }


def _line(verdict: Verdict, datasets: Mapping[str, str]) -> Sequence[str]:
    claim, measured = verdict.claim, verdict.measured
    paper = "" if claim.reported is None else _amount(claim, claim.reported)
    text = claim.text
    if claim.measures:
        compared = f"{claim.better} against {claim.worse}"
        text += f"<br><sub>{compared}, {_compared_in(claim, datasets)}</sub>"
    if measured is None:
        return text, claim.where, paper, "", f"**{verdict.word}**: {verdict.because}"
    ends = f"{_number(claim, measured.low)} to {_number(claim, measured.high)}"
    spread = "" if measured.std is None else f" ± {measured.std:.1f}"
    value = f"{_amount(claim, measured.value)}{spread}<br><sub>{ends}</sub>"
    return text, claim.where, paper, value, f"**{verdict.word}**: {verdict.because}"


def _compared_in(claim: Claim, datasets: Mapping[str, str]) -> str:
    """Benchmarks, each with its metrics and its data set, or how many there are."""
    metrics: dict[str, list[str]] = {}
    for measure in claim.measures:
        metrics.setdefault(measure.benchmark, []).append(metric_name(measure.metric))
    if len(metrics) > MOST_NAMED:
        return f"mean of {len(claim.measures)}, {next(iter(metrics))} to {list(metrics)[-1]}"
    mean = "mean of " if len(claim.measures) > 1 else ""
    texts = (f"{b} [{datasets[b]}] {' and '.join(names)}" for b, names in metrics.items())
    return mean + ", ".join(texts)


def _number(claim: Claim, value: float) -> str:
    return f"{value:.2f}" if claim.ratio else f"{value:+.1f}"


def _amount(claim: Claim, value: float) -> str:
    return f"{value:.3g}x" if claim.ratio else f"{value:+.1f}"
