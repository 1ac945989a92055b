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
    "{sets}. At each spoke: language, and the best value with the marker and the colour of the"
    " run that has it (all markers, in grey, if several share it). In brackets: mean over"
    " languages. The radial axis has a square-root scale."
)
GLYPHS = "\u25cf\u25a0\u25b2\u25c6\u25bc\u271a\u2716\u2605"  # MARKERS as letters
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
    note = NOTE.format(sets=_measured(chosen, settings))
    figure = canvas(width, 6.6 + 0.25 * len(chosen.runs), settings, note)
    grid = figure.subplots(1, len(chosen.metrics), subplot_kw={"projection": "polar"})
    for axes, metric in zip(np.atleast_1d(grid), chosen.metrics, strict=True):
        values = {
            label: _values(results, run, metric, chosen) for label, run in chosen.runs.items()
        }
        _web(axes, values, list(chosen.languages))
        axes.set_title(f"{metric_name(metric, spelled_out=True)}, %", pad=14)
    return figure


def _measured(chosen: Keys, settings: "FigureSettings") -> str:
    """`scenes-en (for Crossmodal-3600 en) to scenes-ar (for Crossmodal-3600 ar)`."""
    benchmarks = [*chosen.languages.values()]
    return " to ".join(settings.called(name) for name in (benchmarks[0], benchmarks[-1]))


def _values(results: "Results", run: str, metric: str, chosen: Keys) -> list[float]:
    return [
        results.rate(run, [Measure(benchmark=benchmark, metric=metric)]).value
        for benchmark in chosen.languages.values()
    ]


def _web(axes: "PolarAxes", values: dict[str, list[float]], languages: list[str]) -> None:
    from matplotlib.patheffects import withStroke
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
    table = np.array([*values.values()])
    best = table.max(axis=0)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    labels = [
        f"{name}\n{_glyphs(column, value)} {value:.1f}"
        for name, column, value in zip(languages, table.T, best, strict=True)
    ]
    axes.set_xticks(angles, labels, parse_math=False)
    for spoke, column, value in zip(axes.get_xticklabels(), table.T, best, strict=True):
        owners = np.flatnonzero(column == value)
        spoke.set_color(PALETTE[owners[0] % len(PALETTE)] if len(owners) == 1 else GREY)
    axes.tick_params(axis="x", pad=8)
    # The training language can be far above the others; a square-root scale shows all.
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set_ylim(0, max(1.1 * best.max(), 1))
    axes.yaxis.set_major_locator(FixedLocator([t for t in TICKS if t < best.max()]))
    axes.tick_params(axis="y", labelsize="small", labelcolor=GREY)
    for ring in axes.get_yticklabels():
        ring.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_rlabel_position(180 / len(languages))  # between the first two spokes
    axes.grid(color="0.85")
    axes.spines["polar"].set_color("0.85")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _glyphs(column: np.ndarray, best: float) -> str:
    """Markers of the runs that have the best value of a spoke."""
    return "".join(GLYPHS[i % len(GLYPHS)] for i in np.flatnonzero(column == best))
