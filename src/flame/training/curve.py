"""Plot of a training run: loss, validation, temperature and learning rate per step."""

import re
from pathlib import Path

import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Metrics that others grow with, and so are not drawn.
WIDER = re.compile(r"top5|.*@(?!1$)\d+")
LONGEST_LEGEND = 12  # curves; of more, no one could tell the colours


def draw(log: Path, out: Path, title: str) -> None:
    """Plot the log of a run.

    Args:
        log: JSON lines with step, loss, tau and lr, or with step and validation.
        out: PNG to write.
        title: name of the run.
    """
    logged = pl.read_ndjson(log, infer_schema_length=None)
    lines = logged.filter(pl.col("loss").is_not_null())
    curves = _curves(logged)
    heights = {"loss": 3, "validation": 3, "tau": 1, "lr": 1}
    if not curves:
        del heights["validation"]
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(8, 2 + 0.8 * sum(heights.values())), layout="constrained")
        FigureCanvasAgg(figure)
        found = figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values()))
        panels = dict(zip(heights, found, strict=True))
        _draw_loss(panels["loss"], lines, title)
        if curves:
            _draw_validation(panels["validation"], curves)
        colour = sns.color_palette("Paired")[1]
        for name, label in (("tau", "temperature"), ("lr", "learning rate")):
            panels[name].plot(lines["step"], lines[name], color=colour, linewidth=2)
            panels[name].set_ylabel(label, fontsize="small")
            panels[name].set_ylim(bottom=0)
        panels["lr"].set(xlabel="step", xlim=(0, lines["step"][-1]))
        panels["lr"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        figure.align_ylabels()
        sns.despine(figure)
        figure.savefig(out, dpi=120)


def _draw_loss(axes: Axes, lines: pl.DataFrame, title: str) -> None:
    smooth = lines["loss"].rolling_mean(max(1, len(lines) // 20), min_samples=1, center=True)
    colour, pale, *_ = sns.color_palette("Paired")[1::-1]
    axes.plot(lines["step"], lines["loss"], color=pale, linewidth=1, label="each step")
    axes.plot(lines["step"], smooth, color=colour, linewidth=2, label="smoothed")
    axes.set(
        ylabel="loss",
        title=f"{title}: loss {smooth[-1]:.3f} at step {lines['step'][-1]:,}",
    )
    axes.legend(frameon=False)


def _curves(logged: pl.DataFrame) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
    """(benchmark, metric) -> steps and percent, of the metrics that are drawn."""
    curves: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    if "validation" not in logged.columns:
        return curves
    for step, found in logged.select("step", "validation").drop_nulls().iter_rows():
        for benchmark, metrics in found.items():
            for metric, percent in (metrics or {}).items():
                # A benchmark that was added or removed has no value in other lines.
                if percent is not None and not WIDER.fullmatch(metric):
                    steps, values = curves.setdefault((benchmark, metric), ([], []))
                    steps.append(step)
                    values.append(percent)
    return curves


def _draw_validation(
    axes: Axes, curves: dict[tuple[str, str], tuple[list[int], list[float]]]
) -> None:
    """A colour for each benchmark, a style of line for each of its metrics."""
    benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in curves))
    colours = dict(zip(benchmarks, sns.color_palette("colorblind", len(benchmarks)), strict=True))
    drawn: dict[str, int] = {}
    for (benchmark, metric), (steps, values) in curves.items():
        number = drawn[benchmark] = drawn.get(benchmark, -1) + 1
        axes.plot(
            steps,
            values,
            color=colours[benchmark],
            linestyle=("-", "--", ":")[number % 3],
            marker="o",
            markersize=4,
            clip_on=False,
            label=f"{benchmark} {_words(metric)}: {values[-1]:.1f}",
        )
    axes.set(ylabel="validation, %")
    axes.set_ylim(bottom=0)
    if len(curves) <= LONGEST_LEGEND:
        # Above the curves, wherever they run.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            fontsize="x-small",
            handlelength=3,
            frameon=False,
        )


def _words(metric: str) -> str:
    """A metric as papers write it: `i2t_r@1` is `I2T R@1`."""
    return re.sub(r"([it]2[it])_r(@\d+)", lambda m: f"{m[1].upper()} R{m[2]}", metric)
