"""Kinds of figures, one module each, found by its file name.

Every module has one function::

    draw(inputs, settings) -> Figure

    inputs: files and folders that the rule `figure` gives to this kind.
    settings: the figure, with what stands behind its names.

It is called within `style`, which all kinds share: one palette that colour-blind readers can tell
apart, and beside every colour a marker and a line of its own, so that a print in grey can be read.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flame.report import results
from flame.report.results import Results
from flame.runtime.errors import known
from flame.study.settings import FigureSettings

PALETTE = [tuple(colour) for colour in sns.color_palette("colorblind")]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
GREY = "0.35"
RC: Any = {
    "axes.titlesize": "medium",
    "figure.titlesize": "large",
    "figure.titleweight": "bold",
    "pdf.fonttype": 42,  # letters stay letters: a PDF can be searched
}


def module(kind: str) -> ModuleType:
    """The module of a kind of figure."""
    kinds = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
    if kind not in kinds:
        raise ValueError(f"unknown kind of figure {known(kind, kinds)}")
    return importlib.import_module(f"{__name__}.{kind}")


@contextmanager
def style() -> Iterator[None]:
    """What all figures look like, until the context ends."""
    with sns.axes_style("ticks"), sns.plotting_context("notebook"), mpl.rc_context(RC):
        yield


def canvas(width: float, height: float, settings: FigureSettings, note: str = "") -> Figure:
    """An empty figure under its title, which names the study that was measured.

    Args:
        width: inches.
        height: inches.
        settings: has the title and the study.
        note: how to read the figure, in small print under it.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"{settings.figure.title} ({settings.study} study)"
    figure.suptitle(title, parse_math=False)
    if note:
        figure.supxlabel(note, fontsize="small", color=GREY, parse_math=False)
    return figure


def read(inputs: Sequence[Path], settings: FigureSettings) -> Results:
    """Results among the inputs: JSON files, each with its Parquet file beside it."""
    metrics = [path for path in inputs if path.suffix == ".json"]
    hits = [path for path in inputs if path.suffix == ".parquet"]
    return results.read(metrics, hits, settings.runs, settings.bootstrap)


def dataset_folder(inputs: Sequence[Path], dataset: str) -> Path:
    """The folder of a data set among the inputs."""
    folders = {path.name: path for path in inputs if path.is_dir()}
    if dataset not in folders:
        raise ValueError(f"no folder of data set {known(dataset, folders)}")
    return folders[dataset]


def training_file(inputs: Sequence[Path], training: str) -> Path:
    """The file of a training among the inputs; it lies in a folder of the training's name."""
    files = {path.parent.name: path for path in inputs if not path.is_dir()}
    if training not in files:
        raise ValueError(f"no file of training {known(training, files)}")
    return files[training]
