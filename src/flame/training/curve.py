"""Plot of a training run: loss, temperature and learning rate per step."""

from pathlib import Path

import polars as pl
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(log: Path, out: Path, title: str) -> None:
    """Plot the log of a run.

    Args:
        log: JSON lines with step, loss, tau and lr.
        out: PNG to write.
        title: name of the run.
    """
    lines = pl.read_ndjson(log)
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        smooth = lines["loss"].rolling_mean(max(1, len(lines) // 20), min_samples=1, center=True)
        colour, pale, *_ = sns.color_palette("Paired")[1::-1]
        top.plot(lines["step"], lines["loss"], color=pale, linewidth=1, label="each step")
        top.plot(lines["step"], smooth, color=colour, linewidth=2, label="smoothed")
        top.set(
            ylabel="loss",
            title=f"{title}: loss {smooth[-1]:.3f} at step {lines['step'][-1]:,}",
        )
        top.legend(frameon=False)
        for axes, name, label in (
            (middle, "tau", "temperature"),
            (bottom, "lr", "learning rate"),
        ):
            axes.plot(lines["step"], lines[name], color=colour, linewidth=2)
            axes.set(ylabel=label)
            axes.set_ylim(bottom=0)
        bottom.set(xlabel="step", xlim=(0, lines["step"][-1]))
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        figure.align_ylabels()
        sns.despine(figure)
        figure.savefig(out, dpi=120)
