"""What a study will take agrees with published figures and with what is counted here by hand."""

import sys

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from flame import plan as program
from flame.report import costs, plan
from flame.report.rates import Assumptions
from flame.runtime import command
from flame.study import stages
from flame.study.load import load_file
from flame.study.shapes import SHAPES, Shape, shape_of
from tests.report.test_paper import PAPER, ROOT

NEMO = SHAPES["mistralai/Mistral-Nemo-Instruct-2407"]


@pytest.fixture(scope="module")
def paper() -> plan.Plan:
    return plan.Plan(load_file(PAPER, ROOT), (), Assumptions())


def test_mistral_nemo_has_its_parameters():
    assert NEMO.layer_parameters == pytest.approx(272.6e6, rel=1e-3)
    assert NEMO.parameters == pytest.approx(12.25e9, rel=2e-3)


def test_parameters_are_those_of_transformers():
    shape = Shape(3, 32, 4, 16, 2, 48, 100)
    config = MistralConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=100,
    )
    with torch.device("meta"):
        llm = MistralForCausalLM(config)
    norms = sum(p.numel() for name, p in llm.named_parameters() if "norm" in name)
    assert shape.parameters == sum(p.numel() for p in llm.parameters()) - norms


def test_the_shape_of_an_llm_is_read_from_its_folder(tmp_path):
    config = MistralConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=100,
    )
    config.save_pretrained(tmp_path)
    assert shape_of(tmp_path) == Shape(3, 32, 4, 16, 2, 48, 100)
    assert shape_of(tmp_path / "other") is None


@pytest.mark.parametrize(
    ("prefix", "suffix", "facets", "ratio"),
    [(20, 16, 3, 1.59), (110, 16, 7, 3.97), (150, 16, 7, 4.43), (300, 16, 7, 5.36)],
)
def test_one_pass_saves_what_its_tokens_save(prefix, suffix, facets, ratio):
    many, one = (
        costs.embedding_flop(NEMO, prefix, suffix, facets, passes=passes)
        for passes in (True, False)
    )
    assert many / one == pytest.approx(ratio, abs=0.01)


def test_one_facet_costs_one_pass():
    costs_of = [costs.embedding_flop(NEMO, 50, 10, 1, passes=passes) for passes in (True, False)]
    assert costs_of[0] == pytest.approx(costs_of[1], rel=1e-12)


def test_towers_cost_what_is_published(paper):
    study = paper.study
    flame = costs.tower_cost(stages.train(study, "flame-7"), 5120)
    assert flame.forward == pytest.approx(35.1e9, rel=0.01)  # ViT-B/16 at 224 pixels
    assert flame.parameters == pytest.approx(86e6 + 768 * 5120 + 5120**2, rel=0.01)
    # open_clip's table of profiles: ViT-B-16, 149.62 million parameters, 41.09 GFLOP for both.
    clip = costs.tower_cost(stages.train(study, "clip"), 0)
    assert clip.parameters == pytest.approx(149.62e6, rel=0.002)
    assert clip.forward == pytest.approx(41.09e9, rel=0.02)


def test_a_store_has_the_size_of_its_values(tmp_path):
    assert costs.store_bytes(1000, 7, 5120) == {
        "float16": 71_680_000 + 28_000,
        "fp8": 35_840_000 + 14_000 + 28_000,
        "int8": 35_840_000 + 143_360 + 28_000,
    }


def test_the_plan_of_the_paper_tells_all(paper, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    told = paper.document()
    assert "HF_TOKEN) is set" in told
    assert "secret-token" not in told
    for words in (
        "| CC3M | 2,905,954 |",
        "HF_TOKEN of an account that accepted the conditions",
        "| mistral-nemo | mistralai/Mistral-Nemo-Instruct-2407 | 24.5 GB |",
        "| cc3m | minicpm | 2,905,954 | 24 | 21.4 | 38 |",
        # 2,905,954 captions x 9 facets x (5,120 values x 2 bytes + 4 of a checksum)
        "267.9 GB | 134.1 GB | 134.0 GB |",
        # The two of the figure of captions: one caption an image, and no second set of images.
        "| mistral-nemo | captioners/long | 10,000 | 7 |",
        "| cc3m-published | published-cc3m | 5,000 | 1 | published | 0.0 |",
        "None of this was measured.",
    ):
        assert words in told
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN) is not set" in paper.document()


def test_hours_follow_the_assumptions(paper):
    def hours(**changes: float) -> dict[str, float]:
        other = plan.Plan(paper.study, (), Assumptions(**changes))
        other.document()
        return {stage: total[0] for stage, total in other.totals.items()}

    plain = hours(captions_per_second=6.0)
    fast = hours(peak=2 * 989.0, captions_per_second=3.0)
    assert fast["embeddings"] == pytest.approx(plain["embeddings"] / 2)
    assert fast["trainings"] == pytest.approx(plain["trainings"] / 2)
    assert fast["captions"] == pytest.approx(plain["captions"] * 2)


def test_by_command_line(monkeypatch, capsys):
    arguments = ["--study", str(PAPER), "--only", "table2"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    command.main(program.plan)
    told = capsys.readouterr().out
    assert "table2" in told
    assert "Crossmodal" not in told
    monkeypatch.setattr(sys, "argv", ["plan", *arguments[:2], "--only", "table22"])
    with pytest.raises(SystemExit, match=r"no table or figure 'table22' .*known: table1"):
        command.main(program.plan)


def test_an_llm_that_is_not_here_is_not_guessed_at(tmp_path, monkeypatch):
    study = load_file(ROOT / "config/config.yaml", ROOT)
    monkeypatch.chdir(tmp_path)
    told = plan.Plan(study, ("table6",), Assumptions()).document()
    assert "| smollm2-135m | package | unknown until downloaded | ? | no | nothing |" in told
    assert "| flame-7 | " in told
