"""What a benchmark or a training set is called beside a number that was measured on it.

The only place that forms such a name: a stand-in is never called by the name of what it stands for.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from flame.study.schema.tables import Measure

NAMED = 2  # data sets listed for a mean; of more, only their number
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def called(name: str, datasets: Sequence[str], *, stand_in: bool) -> str:
    """`ImageNet-1k`, or `nouns (for ImageNet-1k)` if the data set `nouns` stands in for it.

    Args:
        name: of the benchmark, the mean of benchmarks, or the training set.
        datasets: data sets that are measured or trained on, at least one.
        stand_in: whether they stand in for it.
    """
    if not stand_in or list(datasets) == [name]:
        return name
    listed = " and ".join(datasets) if len(datasets) <= NAMED else f"{len(datasets)} stand-ins"
    return f"{listed} (for {name})"


def of_measures(
    name: str,
    measures: Sequence[Measure],
    datasets: Mapping[str, str],
    stand_ins: Collection[str],
) -> str:
    """What one benchmark, or the mean of several, is called.

    Args:
        name: of the benchmark or of the mean.
        measures: what is averaged.
        datasets: benchmark -> data set.
        stand_ins: benchmarks whose data set is a stand-in.
    """
    benchmarks = [measure.benchmark for measure in measures]
    measured = list(dict.fromkeys(datasets[benchmark] for benchmark in benchmarks))
    return called(name, measured, stand_in=any(b in stand_ins for b in benchmarks))


def in_label(label: str, dataset: str | None, *, stand_in: bool) -> str:
    """A label whose `{CC3M}` became `CC3M`, or `scenes (for CC3M)`.

    Args:
        label: text; braces hold the name of a training set.
        dataset: the set that was trained on; None for numbers that the paper reports.
        stand_in: whether it stands in for the one in the label.
    """

    def own(found: re.Match[str]) -> str:
        return called(found[1], [dataset or found[1]], stand_in=stand_in)

    return PLACEHOLDER.sub(own, label)
