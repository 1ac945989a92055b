"""Queries and the images that each run retrieves for them (Figure D2)."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import polars as pl
from pydantic import Field, PositiveInt

from flame.data import captions
from flame.report.figures import GREY, PALETTE, canvas, dataset_folder, training_file
from flame.study import files
from flame.study.schema.figures import FigureBlock
from flame.study.schema.tables import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flame.data.images import ImageReader
    from flame.study.settings import FigureSettings
    from flame.study.study import Study

METRIC = "t2i_r@1"
RIGHT, WRONG = PALETTE[2], PALETTE[3]
INCHES = 1.7  # height of a row and of an image
LETTERS = 52  # characters per line
LINES = 9
HEAD = 14  # characters per line of a column's head


class Keys(FigureBlock):
    """Retrieved images of some queries (Figure D2)."""

    kind: Literal["examples"]
    runs: dict[str, str] = Field(min_length=1, description="label -> run")
    benchmark: str
    queries: PositiveInt

    def uses(self) -> tuple[tuple[str, ...], tuple[Measure, ...]]:
        """Text-to-image retrieval of every run."""
        return tuple(self.runs.values()), (Measure(benchmark=self.benchmark, metric=METRIC),)

    def inputs(self, study: "Study", results: Iterable[str]) -> list[str]:
        """Hits and images."""
        images = files.dataset(study.benchmarks[self.benchmark].dataset)
        return [*files.with_suffix(results, "parquet"), images]


def draw(inputs: Sequence[Path], settings: "FigureSettings") -> "Figure":
    """One row per query: its text, the image that every run retrieves, the image it describes.

    Queries are evenly spaced in the benchmark, whether or not the runs are right.

    Args:
        inputs: Parquet of every run's training, and the folder of the data set.
        settings: the figure.

    Raises:
        ValueError: inputs that do not belong together.
    """
    from flame.data.images import ImageReader

    chosen = settings.figure
    assert isinstance(chosen, Keys)
    reader = ImageReader(dataset_folder(inputs, settings.datasets[chosen.benchmark]))
    answers = {
        label: _answers(training_file(inputs, settings.runs[run].trainings[0]), chosen.benchmark)
        for label, run in chosen.runs.items()
    }
    first = next(iter(answers.values()))
    texts = query_texts(reader.root / captions.FILE, first)
    shown = evenly(len(first), chosen.queries)
    name = settings.called(chosen.benchmark)
    note = (
        f"{name}: {len(shown)} of {len(first)} texts, evenly spaced, and the image that each run"
        " retrieves: a green tick if it is the described image, else a red cross."
    )
    columns = len(answers) + 2
    width = 4.2 + INCHES * (columns - 1)
    figure = canvas(width, INCHES * len(shown) + 1.5, settings, note)
    ratios = [4.2 / INCHES, *[1] * (columns - 1)]
    grid = figure.subplots(len(shown), columns, squeeze=False, width_ratios=ratios)
    rows = {key: row for row, key in enumerate(reader.keys)}
    for line, query in zip(grid, shown, strict=True):
        _text(line[0], texts[query])
        for axes, table in zip(line[1:], answers.values(), strict=False):
            best, hit = table["best"][query], table["hit"][query]
            _image(axes, reader, rows[best], *((RIGHT, "\u2713") if hit else (WRONG, "\u2717")))
        _image(line[-1], reader, rows[first["key"][query]], GREY, "")
    heads = [
        f"{textwrap.fill(n, HEAD)}\nR@1 {100 * float(t['hit'].mean()):.1f} %"  # type: ignore[arg-type]
        for n, t in answers.items()
    ]
    for axes, head in zip(grid[0][1:], [*heads, "described\nimage"], strict=True):
        axes.set_title(head, parse_math=False)
    return figure


def evenly(total: int, wanted: int) -> list[int]:
    """Evenly spaced indices: the middles of `wanted` equal parts of `total`."""
    parts = min(total, wanted)
    return [(2 * i + 1) * total // (2 * parts) for i in range(parts)]


def query_texts(path: Path, answers: pl.DataFrame) -> list[str]:
    """Text of every query: row n of the captions of the evaluated kind.

    Args:
        path: `captions.parquet` of the data set.
        answers: queries in order, with the key of the image of each.

    Raises:
        ValueError: the keys match no kind, or several.
    """
    kinds = captions.by_kind(path)
    fitting = [name for name, rows in kinds.items() if rows["key"].equals(answers["key"])]
    if len(fitting) != 1:
        raise ValueError(
            f"{path}: the queries match the captions of {len(fitting)} kinds, not of one"
            f" ({', '.join(fitting or kinds)})"
        )
    return kinds[fitting[0]]["text"].to_list()


def _answers(file: Path, benchmark: str) -> pl.DataFrame:
    """Queries of one training, in order."""
    table = pl.read_parquet(file).filter(benchmark=benchmark, metric=METRIC)
    if table.is_empty():
        raise ValueError(f"{file}: no {METRIC!r} of benchmark {benchmark!r}")
    return table.sort("query")


def _text(axes: "Axes", text: str) -> None:
    lines = textwrap.wrap(text, LETTERS, max_lines=LINES, placeholder=" ...")
    axes.text(0, 0.5, "\n".join(lines), va="center", fontsize=10, parse_math=False)
    axes.set_axis_off()


def _image(axes: "Axes", reader: "ImageReader", row: int, colour: object, mark: str) -> None:
    axes.imshow(reader.read(row))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=4 if mark else 1.5)
    if mark:
        axes.text(
            0.92,
            0.9,
            mark,
            transform=axes.transAxes,
            ha="center",
            va="center",
            color="white",
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.15", "color": colour},
        )
