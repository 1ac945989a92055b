"""Kinds of figures, one module each, found by its file name.

Every module has a class and a function::

    class Keys(FigureBlock)
        The keys of its block in a study, and what it is drawn from.

    draw(inputs, settings) -> Figure
        inputs: files and folders, those of `Keys.inputs`.
        settings: the figure, with what its names stand for.

The study reads `Keys` of every kind whenever Snakemake starts, so a module imports what draws
(matplotlib, seaborn, torch) in its functions. `draw` is called within `style`, which all kinds
share: a palette that colour-blind readers can tell apart, and for every colour a marker and a line
style of its own, for prints in grey.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.runtime.errors import known

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from flame.report.results import Results
    from flame.study.settings import FigureSettings

# seaborn's "colorblind".
PALETTE = (
    "#0173B2",
    "#DE8F05",
    "#029E73",
    "#D55E00",
    "#CC78BC",
    "#CA9161",
    "#FBAFE4",
    "#949494",
    "#ECE133",
    "#56B4E9",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
GREY = "0.35"
MARGIN = 0.97  # share of the width of a figure that its title and its note may fill
RC: Any = {
    "axes.titlesize": "medium",
    "figure.titlesize": "large",
    "figure.titleweight": "bold",
    "pdf.fonttype": 42,  # letters stay letters: a PDF can be searched
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the style of all figures within this context."""
    import matplotlib as mpl
    import seaborn as sns

    with sns.axes_style("ticks"), sns.plotting_context("notebook"), mpl.rc_context(RC):
        yield


def canvas(width: float, height: float, settings: "FigureSettings", note: str = "") -> "Figure":
    """An empty figure with its title, which names the study.

    Args:
        width: inches.
        height: inches.
        settings: of the figure; gives title and study.
        note: how to read the figure, in small print below it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"{settings.figure.title} ({settings.study} study)"
    wrap_within(figure.suptitle(title, parse_math=False), MARGIN * width)
    if note:
        text = figure.supxlabel(note, fontsize="small", color=GREY, parse_math=False)
        wrap_within(text, MARGIN * width)
    return figure


def wrap_within(text: "Text", width: float) -> None:
    """Break a text into as few lines as fit a width, about equally long; no word is broken.

    Args:
        text: in a figure that can be drawn.
        width: inches.
    """
    figure = text.get_figure(root=True)
    assert figure is not None
    words = " ".join(text.get_text().split())
    fitting: list[str] = []
    for letters in range(len(words), 0, -1):
        lines = textwrap.wrap(words, letters, break_long_words=False, break_on_hyphens=False)
        if fitting and len(lines) > len(fitting):
            break
        text.set_text("\n".join(lines))
        if fitting or text.get_window_extent().width / figure.dpi <= width:
            fitting = lines
    text.set_text("\n".join(fitting or lines))


def read(inputs: Sequence[Path], settings: "FigureSettings") -> "Results":
    """Results among the inputs: JSON files, each with its Parquet file beside it."""
    from flame.report import results

    metrics = [path for path in inputs if path.suffix == ".json"]
    hits = [path for path in inputs if path.suffix == ".parquet"]
    return results.read(metrics, hits, settings.runs)


def dataset_folder(inputs: Sequence[Path], dataset: str) -> Path:
    """The folder of a data set among the inputs."""
    folders = {path.name: path for path in inputs if path.is_dir()}
    if dataset not in folders:
        raise ValueError(f"no folder of data set {known(dataset, folders)}")
    return folders[dataset]


def training_file(inputs: Sequence[Path], training: str) -> Path:
    """The file of a training among the inputs, which is in a folder named after the training."""
    files = {path.parent.name: path for path in inputs if not path.is_dir()}
    if training not in files:
        raise ValueError(f"no file of training {known(training, files)}")
    return files[training]
