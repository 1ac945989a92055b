"""Retrieval in several languages, one spoke per language (Figure 4)."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from flame.report.figures import GREY, LINES, MARKERS, PALETTE, canvas, read
from flame.report.markdown import metric_name
from flame.study.schema.figures import FigureBlock
from flame.study.schema.tables import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.projections.polar import PolarAxes

    from flame.report.results import Results
    from flame.study.settings import FigureSettings

NOTE = (
    "Each spoke is labelled with its language and the best value, in %. In brackets: mean over"
    " languages. The radial axis has a square-root scale."
)
TICKS = (1, 5, 10, 20, 40, 60, 80, 100)


class Keys(FigureBlock):
    """Metrics over languages (Figure 4)."""

    kind: Literal["radar"]
    runs: dict[str, str] = Field(min_length=1, description="label -> run")
    languages: dict[str, str] = Field(min_length=3, description="language -> benchmark")
    metrics: tuple[str, ...] = Field(min_length=1, description="one plot per metric")

    def uses(self) -> tuple[tuple[str, ...], tuple[Measure, ...]]:
        """Every run, in every metric of every language."""
        names, metrics = self.languages.values(), self.metrics
        measures = (Measure(benchmark=b, metric=m) for b in names for m in metrics)
        return tuple(self.runs.values()), tuple(measures)


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """One polar plot per metric, one line per run.

    Args:
        inputs: JSON and Parquet files of the evaluate stage.
        settings: the figure.
    """
    chosen = settings.figure
    assert isinstance(chosen, Keys)
    results = read(inputs, settings)
    width = max(5.2 * len(chosen.metrics), 7)
    figure = canvas(width, 6.4 + 0.25 * len(chosen.runs), settings, NOTE)
    grid = figure.subplots(1, len(chosen.metrics), subplot_kw={"projection": "polar"})
    for axes, metric in zip(np.atleast_1d(grid), chosen.metrics, strict=True):
        values = {
            label: _values(results, run, metric, chosen) for label, run in chosen.runs.items()
        }
        _web(axes, values, list(chosen.languages))
        axes.set_title(f"{metric_name(metric, spelled_out=True)}, %", pad=14)
    return figure


def _values(results: "Results", run: str, metric: str, chosen: Keys) -> list[float]:
    return [
        results.rate(run, [Measure(benchmark=benchmark, metric=metric)]).value
        for benchmark in chosen.languages.values()
    ]


def _web(axes: "PolarAxes", values: dict[str, list[float]], languages: list[str]) -> None:
    from matplotlib.ticker import FixedLocator

    angles = np.linspace(0, 2 * math.pi, len(languages), endpoint=False)
    closed = [*angles, angles[0]]
    for i, (label, row) in enumerate(values.items()):
        axes.plot(
            closed,
            [*row, row[0]],
            color=PALETTE[i % len(PALETTE)],
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=2,
            label=f"{label} ({fmean(row):.1f})",
        )
    best = np.max([*values.values()], axis=0)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    labels = [f"{name}\n{value:.1f}" for name, value in zip(languages, best, strict=True)]
    axes.set_xticks(angles, labels, parse_math=False)
    axes.tick_params(axis="x", pad=8)
    # The training language can be far above the others; a square-root scale shows all.
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set_ylim(0, max(1.1 * best.max(), 1))
    axes.yaxis.set_major_locator(FixedLocator([t for t in TICKS if t < best.max()]))
    axes.tick_params(axis="y", labelsize="small", labelcolor=GREY)
    axes.set_rlabel_position(180 / len(languages))  # between the first two spokes
    axes.grid(color="0.85")
    axes.spines["polar"].set_color("0.85")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
