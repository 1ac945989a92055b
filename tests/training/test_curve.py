"""The plot of a training run shows what its log holds."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from flame.training import curve


def step(number):
    return {"step": number, "epoch": 1, "loss": 5.0 - number / 10, "tau": 0.07, "lr": 1e-3}


def validation(number, **benchmarks):
    return {"step": number, "epoch": number // 3, "seconds": 0.1, "validation": benchmarks}


def recall(first):
    ranks = {f"{way}_r@{k}": first + k for way in ("i2t", "t2i") for k in (1, 5, 10)}
    return {"MSCOCO": ranks, "ImageNet": {"top1": first, "top5": first + 5.0}}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws some lines of a log and returns the figure."""
    figures = []
    real = Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        real(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def drawn(lines):
        log, out = tmp_path / "log.jsonl", tmp_path / "loss.png"
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        curve.draw(log, out, "flame-7")
        Image.open(out).verify()
        return figures[-1]

    return drawn


def test_without_validation_there_is_no_panel_for_it(drawn):
    figure = drawn([step(n) for n in range(1, 7)])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "temperature", "learning rate"]


def test_recall_at_1_and_top_1_are_drawn_with_their_last_values(drawn):
    """More lines than polars looks at by default come before the first validation."""
    lines = [step(n) for n in range(1, 202)]
    lines += [validation(201, **recall(10.0)), step(202), validation(202, **recall(20.0))]
    figure = drawn(lines)
    panel = figure.axes[1]
    assert panel.get_ylabel() == "validation, %"
    assert [line.get_label() for line in panel.lines] == [
        "MSCOCO I2T R@1: 21.0",
        "MSCOCO T2I R@1: 21.0",
        "ImageNet top1: 20.0",
    ]
    assert list(panel.lines[2].get_xdata()) == [201, 202]
    assert list(panel.lines[2].get_ydata()) == [10.0, 20.0]
    assert len({line.get_color() for line in panel.lines}) == 2
    assert len(figure.axes[0].lines[0].get_xdata()) == 202


def test_a_benchmark_that_was_added_later_has_a_shorter_curve(drawn):
    first = {"MSCOCO": recall(1.0)["MSCOCO"]}
    figure = drawn([validation(0, **first), step(1), validation(1, **recall(2.0))])
    lengths = [len(line.get_xdata()) for line in figure.axes[1].lines]
    assert lengths == [2, 2, 1]
