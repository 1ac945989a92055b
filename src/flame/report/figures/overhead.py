"""Time of embedding and training, compared with the alternatives (Figure 5)."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from flame.report.figures import GREY, PALETTE, canvas
from flame.study import files
from flame.study.schema.figures import FigureBlock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.study.settings import FigureSettings
    from flame.study.study import Study

# Alternative, as the stage names it -> label; the last one is what this workflow does.
EMBEDDING = {
    "separate": "one pass per prompt",
    "one_pass": "one pass, mask only",
    "everything": "one pass, this workflow",
}
TRAINING = {
    "online": "FLAME, LLM in every step",
    "clip": "CLIP with its text tower",
    "flame": "FLAME, stored embeddings",
}
HATCHES = ("", "//", "xx")  # for prints without colour
WIDEST = 12  # largest ratio on a linear axis
LOWEST = 0.1  # where a logarithmic axis begins, so that a bar of 1 has a length


class Keys(FigureBlock):
    """Timings (Figure 5)."""

    kind: Literal["overhead"]

    def mistakes(self, study: "Study") -> Iterator[tuple[str, str]]:
        """A study without timings."""
        if study.overhead is None:
            yield "kind", "needs timings, but the study has no block `overhead`"

    def inputs(self, study: "Study", results: Iterable[str]) -> list[str]:
        """The timings."""
        return [files.output("overhead")]


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """Bars of the time of embedding and of a training step, relative to this workflow.

    Args:
        inputs: JSON of the overhead stage.
        settings: the figure.
    """
    measured = json.loads(inputs[0].read_text())
    rounds = len(measured["seconds"]["flame"])
    note = (
        f"Time relative to the bar of 1: median over {rounds} interleaved rounds, in brackets the"
        f" range. {measured['device']}; {measured['captions']} captions,"
        f" {measured['steps']['flame']} steps per round, on batches read beforehand."
    )
    figure = canvas(11, 3.6, settings, note)
    left, right = figure.subplots(1, 2)
    left.set_title("embedding of a long caption")
    _bars(left, measured["seconds"], EMBEDDING)
    right.set_title("training step")
    _bars(right, measured["seconds"], TRAINING)
    return figure


def relative(
    seconds: Mapping[str, Sequence[float]], ways: Mapping[str, str]
) -> dict[str, tuple[float, float, float]]:
    """Median, smallest and largest ratio over rounds of every alternative to the last one."""
    base = seconds[[*ways][-1]]
    found = {}
    for name in ways:
        each = [a / b for a, b in zip(seconds[name], base, strict=True)]
        found[name] = median(each), min(each), max(each)
    return found


def _bars(axes: "Axes", seconds: Mapping[str, Sequence[float]], ways: Mapping[str, str]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    ratios = relative(seconds, ways)
    highest = max(high for _, _, high in ratios.values())
    wide = highest > WIDEST
    left = LOWEST if wide else 0.0
    for i, (value, low, high) in enumerate(ratios.values()):
        last = i == len(ratios) - 1
        axes.barh(
            i,
            value - left,
            left=left,
            height=0.62,
            color=PALETTE[0] if last else PALETTE[1 + i],
            hatch=HATCHES[i],
            edgecolor="white",
            xerr=None if last else [[value - low], [high - value]],
            error_kw={"ecolor": GREY, "capsize": 4, "linewidth": 1.5},
        )
        label = f"{_short(value)}x ({_short(low)}-{_short(high)})"
        if last:
            unit = median(seconds[[*ways][-1]])
            label = f"1 = {unit:.3g} s" if unit >= 1 else f"1 = {1000 * unit:.3g} ms"
        axes.annotate(
            label, (high, i), xytext=(8, 0), textcoords="offset points", va="center", fontsize=11
        )
    if wide:
        axes.set_xscale("log")
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_xlim(LOWEST, highest * (highest / LOWEST) ** 0.6)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.tick_params(which="minor", bottom=False)
    else:
        axes.set_xlim(0, 1.7 * highest)
    axes.set_yticks(range(len(ways)), list(ways.values()))
    axes.set_xlabel("relative time" + (f", logarithmic from {LOWEST:g}" if wide else ""))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _short(ratio: float) -> str:
    """Three digits: `4.10`, `15.2`, `239`."""
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"
