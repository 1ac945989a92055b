"""Claims of the paper and whether they hold, judged by measured differences and ratios."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

from flame.report.knowledge_claims import Probes
from flame.report.knowledge_claims import compared as compared_probes
from flame.report.markdown import markdown_table, metric_name
from flame.report.results import Estimate, Results
from flame.runtime.errors import known
from flame.study.schema.tables import Claim
from flame.study.settings import ClaimsSettings, TableSettings

Word = Literal["holds", "contradicted", "undecided", "cannot be tested here"]
MOST_NAMED = 4  # benchmarks listed for a claim; of more, only the number, the first and the last
WORDS: tuple[Word, ...] = ("holds", "contradicted", "undecided", "cannot be tested here")
PREAMBLE = """\
# Claims of the paper in the *{study}* study

Claims of FLAME (arXiv 2411.11927), judged by the results of the *{study}* study.
{total} claims: **{holds} hold**, **{contradicted} are contradicted**, **{undecided} are
undecided**, **{untested} cannot be tested here**.

- A claim **holds** if the whole 95 % interval, not only the value, lies above 0 (or above the
  claimed ratio), and is **contradicted** if it lies below. If it contains 0, the study leaves the
  claim **undecided**, and the verdict names the smallest difference that the study would have found
  with a probability of 80 %.
- Differences are in percentage points, between means over the trainings of both runs, and paired by
  query. The interval covers the choice of the queries and the chance in the trainings (seeds and,
  where prompts are drawn, draws); a run that was trained once borrows the variance of the runs of
  its method that were trained several times. docs/statistics.md explains how. ± is the standard
  deviation over the trainings.
- *nouns (for ImageNet-1k)*: measured on the data set nouns, a stand-in for ImageNet-1k. Of such a
  difference, only the sign is comparable with the paper's, not the size.
- For a ratio of times, the range over the rounds of measurement replaces the interval.
"""
ONCE = "too few trainings of a kind, so how much trainings differ is unknown"


class Verdict(NamedTuple):
    """The outcome for one claim."""

    claim: Claim
    measured: Estimate | None
    """Difference in points, or ratio; None if the claim cannot be tested."""
    word: Word
    because: str
    """Position of the interval, or the reason why there is none."""


def judge(
    claim: Claim,
    results: Results,
    ratios: Mapping[str, Mapping[str, float]],
    probes: Probes | None = None,
) -> Verdict:
    """Verdict on a claim.

    A claim holds if its whole interval, not only its value, lies above 0, or above the claimed
    ratio; it is contradicted if the whole interval lies below, and undecided otherwise.

    Args:
        claim: two runs and the metrics they are compared in, a ratio, or the reason why it cannot
            be tested.
        results: measured values of the runs.
        ratios: name -> value, low and high, from the overhead stage.
        probes: from the knowledge stage, for a claim on what prompts know.
    """
    if claim.untested is not None:
        return Verdict(claim, None, "cannot be tested here", claim.untested)
    if claim.ratio is not None:
        if claim.ratio not in ratios:
            raise ValueError(f"claim {claim.text!r}: no ratio {known(claim.ratio, ratios)}")
        found = ratios[claim.ratio]
        measured = Estimate(found["value"], found["low"], found["high"])
    elif claim.knows is not None:
        assert probes is not None
        measured = probes.difference(claim.knows)
    else:
        assert claim.better is not None
        assert claim.worse is not None
        measured = results.difference(claim.better, claim.worse, claim.measures)
    bound = claim.above or 0.0
    if not measured.trainings:
        return Verdict(claim, measured, "cannot be tested here", ONCE)
    if measured.low > bound:
        return Verdict(claim, measured, "holds", f"the whole interval is above {bound:g}")
    if measured.high < bound:
        return Verdict(claim, measured, "contradicted", f"the whole interval is below {bound:g}")
    because = f"the interval contains {bound:g}"
    if measured.detectable is not None:
        because += f"; differences from {measured.detectable:.1f} points on would have been found"
    return Verdict(claim, measured, "undecided", because)


def as_csv(verdicts: Iterable[Verdict], settings: ClaimsSettings) -> str:
    """CSV with one line per claim; differences are in points, ratios plain."""
    records = [_record(verdict, settings) for verdict in verdicts]
    return pl.DataFrame(records, infer_schema_length=None).write_csv(float_precision=2)


def as_markdown(verdicts: Sequence[Verdict], settings: ClaimsSettings) -> str:
    """Markdown page: how many claims hold, how they are judged, and one line per claim."""
    counts = Counter(verdict.word for verdict in verdicts)
    holds, contradicted, undecided, untested = (counts[word] for word in WORDS)
    preamble = PREAMBLE.format(
        study=settings.study,
        total=len(verdicts),
        holds=holds,
        contradicted=contradicted,
        undecided=undecided,
        untested=untested,
    )
    return f"{preamble}\n{claims_table(verdicts, settings)}"


def claims_table(verdicts: Iterable[Verdict], settings: ClaimsSettings | TableSettings) -> str:
    """Markdown table with one line per claim.

    Args:
        verdicts: one per claim.
        settings: say what was measured.
    """
    head = ["claim", "source", "paper", "measured", "verdict"]
    rule = ["---", "---", "---:", "---:", "---"]
    lines = [_line(verdict, settings) for verdict in verdicts]
    return markdown_table([head, rule, *lines])


def _record(verdict: Verdict, settings: ClaimsSettings) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "claim": claim.text,
        "where": claim.where,
        "better": claim.better,
        "worse": claim.worse,
        "measures": "; ".join(f"{settings.called(m.benchmark)} {m.metric}" for m in claim.measures),
        "measured in": _measured_in(claim, settings),
        "ratio": claim.ratio,
        "paper": claim.reported,
        **{key: getattr(verdict.measured, key, None) for key in Estimate._fields},
        "verdict": verdict.word,
        "because": verdict.because,
    }


def _line(verdict: Verdict, settings: ClaimsSettings | TableSettings) -> Sequence[str]:
    claim, measured = verdict.claim, verdict.measured
    paper = "" if claim.reported is None else _amount(claim, claim.reported)
    text = claim.text
    if claim.measures:
        compared = f"{claim.better} vs. {claim.worse}"
        text += f"<br><sub>{compared}: {_compared_in(claim, settings)}</sub>"
    if claim.knows is not None:
        text += f"<br><sub>{compared_probes(claim.knows)}</sub>"
    if measured is None:
        return text, claim.where, paper, "", f"**{verdict.word}**: {verdict.because}"
    ends = f"{_number(claim, measured.low)} to {_number(claim, measured.high)}"
    spread = "" if measured.std is None else f" ± {measured.std:.1f}"
    value = f"{_amount(claim, measured.value)}{spread}<br><sub>{ends}</sub>"
    return text, claim.where, paper, value, f"**{verdict.word}**: {verdict.because}"


def _measured_in(claim: Claim, settings: ClaimsSettings) -> str | None:
    if claim.knows is not None:
        return compared_probes(claim.knows)
    return _compared_in(claim, settings) if claim.measures else claim.ratio


def _compared_in(claim: Claim, settings: ClaimsSettings | TableSettings) -> str:
    """What was measured and its metrics; of many, their number and both ends."""
    metrics: dict[str, list[str]] = {}
    for measure in claim.measures:
        called = settings.called(measure.benchmark)
        metrics.setdefault(called, []).append(metric_name(measure.metric))
    if len(metrics) > MOST_NAMED:
        return f"mean of {len(claim.measures)}, from {next(iter(metrics))} to {list(metrics)[-1]}"
    mean = "mean of " if len(claim.measures) > 1 else ""
    texts = (f"{called} {' and '.join(each)}" for called, each in metrics.items())
    return mean + ", ".join(texts)


def _number(claim: Claim, value: float) -> str:
    return f"{value:.2f}" if claim.ratio else f"{value:+.1f}"


def _amount(claim: Claim, value: float) -> str:
    return f"{value:.3g}x" if claim.ratio else f"{value:+.1f}"
