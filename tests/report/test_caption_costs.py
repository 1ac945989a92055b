"""The formula of captions agrees with a published benchmark and with counted parameters."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from flame.report import caption_costs as costs
from flame.report.rates import Assumptions, Rates, RatesFile


def test_a_slice_costs_what_timm_counts():
    with torch.device("meta"):
        tower = timm.create_model("vit_so400m_patch14_siglip_gap_448", num_classes=0)
        image = torch.empty(1, 3, 448, 448)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(image)
    resampler = 2 * costs.PATCHES * (1152 * 4096 + 2 * 4096**2)
    assert costs.slice_flop() - resampler == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_published_benchmark_of_vllm_is_within_the_formula():
    # SGLang's benchmark of vLLM 0.6.0 (benchmark/benchmark_vllm_060): Llama-3.1-8B on an A100,
    # 21.27 requests and 4,132 new tokens a second, about 226 tokens of prompt.
    a100 = Assumptions(peak=312.0, bandwidth=2.04)
    new = 4132 / 21.27
    token = costs.token_seconds(costs.LLAMA, 226 + new / 2, a100, 312e12)
    busy = costs.prompt_flop(costs.LLAMA, 226) / (312e12 * a100.caption_mfu) + new * token
    assert a100.caption_engine < 21.27 * busy < 1


def test_two_captions_share_the_image():
    rates = Rates(Assumptions())
    long, short, both = (
        costs.caption_time(kinds, rates) for kinds in (["long"], ["short"], ["long", "short"])
    )
    assert both.vision == long.vision == short.vision
    assert both.prompts < 1.1 * long.prompts
    assert both.writing == pytest.approx(long.writing * 152 / 130)


def test_writing_is_bound_by_memory_on_an_h100():
    flop, size = costs.step_cost(costs.LLAMA, 400)
    assert size / 3.35e12 > flop / 989e12
    # Weights of 7.5 billion parameters once, and 128 kB of keys and values a token.
    assert size == pytest.approx(2 * 7.5e9 + 256 * 400 * 131_072, rel=0.01)


def test_measured_parts_take_the_place_of_the_formula():
    parts = {"slices_per_second": 300.0, "prompt_tokens_per_second": 3480.0}
    found = RatesFile(
        device="x",
        date="2026-11-27",
        source="y",
        rates=parts | {"caption_tokens_per_second": 1520.0},
    )
    time = costs.caption_time(["long", "short"], Rates(Assumptions(), found))
    assert (time.vision, time.prompts, time.writing) == pytest.approx((0.01, 0.1, 0.1))
    assert time.seconds == pytest.approx(0.21 / 0.5)
    whole = RatesFile(device="x", date="2026-11-27", source="y", rates={"captions_per_second": 9.0})
    assert costs.captions_per_second(["long"], Rates(Assumptions(), whole)).value == 9
