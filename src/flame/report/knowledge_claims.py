"""Claims on what prompts know: differences between probes, paired by held-out caption (ours)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame.evaluation.bootstrap import mean_interval
from flame.report.results import Estimate
from flame.study.schema.knowledge import Knows
from flame.study.settings import Probed

Hits = NDArray[np.float64]


class Answers(NamedTuple):
    """Hits of the probes of one attribute under all prompts of an LLM."""

    queries: tuple[int, ...]
    """Captions to which the attribute applies."""
    hits: dict[str, Hits]
    """Facet -> (queries,), each 0 or 1."""


class Probes(NamedTuple):
    """Hits of the probes of every LLM."""

    answers: dict[str, dict[str, Answers]]
    """Label of the LLM -> attribute -> answers."""
    probed: Probed

    def difference(self, knows: Knows) -> Estimate:
        """Difference of a claim in points, with a 95 % bootstrap interval over captions.

        All answers to a caption are resampled together; only attributes that apply to other
        captions, such as an action, are resampled apart. The LLMs are fixed, so no training takes
        part.

        Raises:
            ValueError: two LLMs were probed on different captions.
        """
        own, sets = self.answers[knows.llm], defaultdict(list)
        if knows.beyond is None:
            for facet, attribute in self.probed.block.asks_for.items():
                queries, hits = own[attribute]
                others = np.mean([hits[name] for name in hits if name != facet], axis=0)
                sets[queries].append(hits[facet] - others)
        else:
            for attribute, (queries, hits) in own.items():
                beyond = self.answers[knows.beyond][attribute]
                if beyond.queries != queries:
                    raise ValueError(
                        f"{knows.llm!r} and {knows.beyond!r} were probed on different captions"
                    )
                means = [np.mean([*each.values()], axis=0) for each in (hits, beyond.hits)]
                sets[queries].append(means[0] - means[1])
        values = [100 * np.stack(measures) for measures in sets.values()]
        low, high = mean_interval(values, **self.probed.bootstrap.model_dump())
        return Estimate(fmean(float(m.mean()) for each in values for m in each), low, high)


def read(hits: Sequence[Path], probed: Probed) -> Probes:
    """Hits of every LLM.

    Args:
        hits: Parquet files of the knowledge stage, one per LLM.
        probed: names and labels.
    """
    found = {path.stem: _answers(path) for path in hits}
    return Probes({label: found[llm] for label, llm in probed.block.llms.items()}, probed)


def _answers(path: Path) -> dict[str, Answers]:
    parts = pl.read_parquet(path).sort("query").partition_by("attribute", "facet", as_dict=True)
    answers: dict[str, Answers] = {}
    for (attribute, facet), rows in parts.items():
        queries = tuple(rows["query"].to_list())
        into = answers.setdefault(str(attribute), Answers(queries, {}))
        into.hits[str(facet)] = rows["hit"].cast(pl.Float64).to_numpy()
    return answers


def compared(knows: Knows) -> str:
    """What a claim compares, for readers."""
    if knows.beyond is None:
        return f"{knows.llm}: each prompt on what it asks for, against the mean of the others"
    return f"{knows.llm} against {knows.beyond}: mean of all prompts and attributes"
