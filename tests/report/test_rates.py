"""Measured rates take the place of assumed ones, and an estimate says which is which."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flame import plan as program
from flame.report import rates
from flame.report.plan import Plan
from flame.report.rates import Assumptions, Rates, RatesFile
from flame.runtime import command
from flame.study.load import load_file
from flame.study.study import Study
from tests.report.test_paper import PAPER, ROOT

B16, L14 = "vit_base_patch16_clip_224", "vit_large_patch14_clip_224"


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(PAPER, ROOT)


def measured(**values: Any) -> RatesFile:
    return RatesFile(device="a card", date="2026-11-27", source="bench/gpu.py", rates=values)


def document(
    study: Study, measured: RatesFile | None, only: str = "figure_d2", **assumed: Any
) -> tuple[str, Plan]:
    estimate = Plan(study, (only,), Assumptions(**assumed), measured)
    return estimate.document(), estimate


def hours(study: Study, measured: RatesFile | None, **assumed: Any) -> dict[str, float]:
    return {k: v[0] for k, v in document(study, measured, **assumed)[1].totals.items()}


def speed_of(told: str) -> dict[str, float]:
    """Run -> images per second, from the table of trainings."""
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if "_patch" in line]
    return {row[0]: float(row[5].replace(",", "")) for row in rows if len(row) > 5}


def test_a_measured_rate_takes_the_place_of_an_assumed_one(study):
    plain = hours(study, None)
    faster = hours(study, measured(embed_mfu=0.6, images_per_second=1600.0))
    assert faster["embeddings"] == pytest.approx(plain["embeddings"] * 0.5 / 0.6)
    assert faster["evaluations"] == pytest.approx(plain["evaluations"] / 2)
    assert faster["trainings"] == plain["trainings"]
    given = hours(study, measured(embed_mfu=0.6), embed_mfu=0.25)
    assert given["embeddings"] == pytest.approx(plain["embeddings"] * 2)


def test_training_is_measured_by_backbone(study):
    before = speed_of(document(study, None, "table7")[0])
    told, _ = document(study, measured(train_mfu={B16: 0.15, L14: 0.45}), "table7")
    speed = speed_of(told)
    assert speed["flame-7"] == pytest.approx(before["flame-7"] / 2, rel=1e-3)
    assert speed["flame-large"] == pytest.approx(before["flame-large"] * 1.5, rel=1e-2)
    assert speed["flame-small"] == before["flame-small"]
    assert f"training at 45.0% of that for {L14}: measured on a card, 2026-11-27" in told
    assert "training at 30.0% of that for other backbones: assumed" in told


def test_an_estimate_says_of_each_rate_where_it_comes_from(study):
    told, _ = document(study, None)
    assert "embedding at 50.0% of that: assumed" in told
    assert told.endswith("None of this was measured.\n")
    told, _ = document(study, measured(embed_mfu=0.61), train_mfu=0.2)
    assert (
        "embedding at 61.0% of that: measured on a card, 2026-11-27, by bench/gpu.py\n"
        "- training at 20.0% of that: as given\n"
    ) in told
    assert "evaluation of 800 images/s: assumed" in told
    assert told.endswith("Everything else is assumed.\n")


def test_a_batch_that_does_not_fit_costs_another_forward_pass(study):
    few, many = (document(study, None, "table7", gpus=gpus)[0] for gpus in (8, 64))
    for run, is_split in (("flame-7", False), ("flame-large", True), ("clip-large", True)):
        split, whole = (speed_of(told)[run] for told in (few, many))
        assert whole / split == pytest.approx(4 / 3 if is_split else 1, rel=1e-2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"rates\.json: not JSON"),
        ('{"device": "x"}', r"rates\.json: date: Field required"),
        (
            '{"device": "x", "date": "2026-11-27", "source": "y", "rates": {"embed_mfus": 0.5}}',
            r"rates\.json: rates: unknown key 'embed_mfus' \(did you mean 'embed_mfu'\?\)",
        ),
        (
            '{"device": "x", "date": "2026-11-27", "source": "y", "rates": {"embed_mfu": 60}}',
            r"rates\.json: rates\.embed_mfu: Input should be less than or equal to 1",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(text, words, tmp_path, monkeypatch):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        rates.read(path)
    arguments = ["plan", "--study", str(PAPER), "--rates", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=words):
        command.main(program.plan)


def test_the_rates_of_the_checkout_are_used_if_there_are_any(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench").mkdir()
    values = {"device": "H100", "date": "2026-11-27", "source": "bench/gpu.py"}
    content = json.dumps(values | {"rates": {"embed_mfu": 0.6}})
    (tmp_path / "bench/rates.json").write_text(content)
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--study", "config/paper.yaml", "--only", "table6"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main(program.plan)
    assert "60.0% of that: measured on H100, 2026-11-27" in capsys.readouterr().out


def test_the_rates_of_this_checkout_can_be_read():
    path = ROOT / rates.MEASURED
    assert not path.is_file() or rates.read(Path(path)).device


def test_a_rate_without_value_is_none():
    assert Rates(Assumptions()).find("captions_per_second") is None
