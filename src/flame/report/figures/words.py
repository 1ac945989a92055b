"""Words that image patches map to, drawn on the image (Figure C1)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flame.report.figures import canvas, dataset_folder, training_file
from flame.runtime.errors import known
from flame.study import files
from flame.study.schema.figures import FigureBlock
from flame.study.schema.tables import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.study.settings import FigureSettings
    from flame.study.study import Study

INCHES = 2.9  # per image
COLUMNS = 4
LARGEST = 13  # font size, points
SHARE = 0.7  # width of a bold letter relative to its height
VEIL = 0.5  # opacity of white between image and words
NOTE = (
    "Each patch shows {token} for its feature (run {run}); fainter ones are less probable than"
    " others in the same image. Below each image: its class. Images: {name}."
)
PROBABLE = "the most probable token of {llm}"
CONTRASTED = "the word whose probability {llm} raises most above that for a mean caption,"


class Keys(FigureBlock):
    """Words of image patches (Figure C1)."""

    kind: Literal["words"]
    run: str
    benchmark: str

    def uses(self) -> tuple[tuple[str, ...], tuple[Measure, ...]]:
        """The few-shot result of the run, which holds the words; no metric."""
        return (self.run,), (Measure(benchmark=self.benchmark, metric=""),)

    def inputs(self, study: "Study", results: Iterable[str]) -> list[str]:
        """Words and images."""
        images = files.dataset(study.benchmarks[self.benchmark].dataset)
        return [*files.with_suffix(results, "words.json"), images]

    def resolved(self, study: "Study") -> dict[str, Any]:
        """LLM of the run, and how a word is chosen."""
        fewshot = study.benchmarks[self.benchmark].fewshot
        return {"speaker": (study.llm_of(self.run), fewshot and fewshot.contrast)}


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """Images with a grid of words over them.

    Args:
        inputs: words of the fewshot stage, and the folder of the data set.
        settings: the figure.
    """
    from flame.data.images import ImageReader

    chosen = settings.figure
    assert isinstance(chosen, Keys)
    folder = dataset_folder(inputs, settings.datasets[chosen.benchmark])
    reader = ImageReader(folder)
    rows = {key: row for row, key in enumerate(reader.keys)}
    pictures = json.loads(training_file(inputs, settings.runs[chosen.run].trainings[0]).read_text())
    columns = min(COLUMNS, len(pictures))
    lines = -(-len(pictures) // columns)
    name = settings.called(chosen.benchmark)
    assert settings.speaker is not None
    llm, contrast = settings.speaker
    token = (PROBABLE if contrast is None else CONTRASTED).format(llm=llm)
    note = NOTE.format(token=token, run=chosen.run, name=name)
    figure = canvas(max(INCHES * columns, 6), (INCHES + 0.3) * lines + 1.1, settings, note)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes in grid[len(pictures) :]:
        axes.remove()
    for axes, picture in zip(grid, pictures, strict=False):
        if picture["key"] not in rows:
            raise ValueError(f"{folder} has no image {known(picture['key'], rows)}")
        axes.imshow(reader.read(rows[picture["key"]]), interpolation="nearest", extent=(0, 1, 1, 0))
        axes.imshow([[1.0]], cmap="gray", vmin=0, vmax=1, alpha=VEIL, extent=(0, 1, 1, 0))
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(picture["label"], parse_math=False)
        _words(axes, picture)
    return figure


def _words(axes: "Axes", picture: Mapping[str, Any]) -> None:
    """Every word in the middle of its patch, as large as it fits."""
    from matplotlib.patheffects import withStroke

    best = max(max(line) for line in picture["probabilities"])
    side = len(picture["words"])
    pairs = zip(picture["words"], picture["probabilities"], strict=True)
    for y, (words, probabilities) in enumerate(pairs):
        for x, (word, probability) in enumerate(zip(words, probabilities, strict=True)):
            fitting = 72 * 0.82 * INCHES / side / (SHARE * max(len(word), 1))
            axes.text(
                (x + 0.5) / side,
                (y + 0.5) / side,
                word,
                ha="center",
                va="center",
                fontsize=min(LARGEST, fitting),
                fontweight="bold",
                alpha=0.35 + 0.65 * probability / best,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                parse_math=False,
            )
