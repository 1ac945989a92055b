"""Speed settings change what an LLM costs, not what it computes."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from flame.embedding.attention import facet_mask, grouped_attention, masked_attention
from flame.embedding.llm import AS_PUBLISHED, FrozenLLM
from flame.embedding.speed import FusedNorm, LLMSpeed, fuse_norms

VOCABULARY = 97
DRAW = torch.Generator().manual_seed(0)


def tokens(*lengths: int) -> list[list[int]]:
    return [torch.randint(VOCABULARY, (n,), generator=DRAW).tolist() for n in lengths]


PREFIXES, ENDINGS = tokens(5, 40, 33, 9, 100, 1), tokens(5, 3, 6)


def config(architecture: str, layers: int = 4):
    own = {}
    if architecture == "mistral":
        own = {"sliding_window": None}
    if architecture == "gemma3_text":
        kinds = ("sliding_attention", "full_attention")
        own = {
            "layer_types": [kinds[i % 2] for i in range(layers)],
            "sliding_window": 32,
            "query_pre_attn_scalar": 16,
        }
    return AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        **own,
    )


def model_of(architecture: str, dtype: torch.dtype = torch.float32, **kwargs):
    """Random weights, those of the norms included."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config(architecture), dtype=torch.float32, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                # Exact in bfloat16 whether or not one is added to it, as Gemma does.
                module.weight += torch.randint(-7, 8, module.weight.shape) / 16
    return model.to(dtype).eval()


@torch.inference_mode()
def one_by_one(model) -> torch.Tensor:
    """(N, K, D): plain transformers, one caption and one facet at a time, unpadded, no cache."""
    rows = [
        model(torch.tensor([prefix + ending])).last_hidden_state[0, -1].float()
        for prefix in PREFIXES
        for ending in ENDINGS
    ]
    return torch.stack(rows).unflatten(0, (len(PREFIXES), -1))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


SPEEDS = [
    LLMSpeed(),
    LLMSpeed(fused_norms=True),
    LLMSpeed(attention="sdpa"),
    LLMSpeed(fused_norms=True, attention="sdpa", token_budget=200),
]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_every_speed_embeds_what_plain_transformers_does(architecture, speed):
    expected = one_by_one(model_of(architecture, attn_implementation="sdpa"))
    ours = FrozenLLM.from_model(model_of(architecture), speed=speed)
    assert gap(ours.embed_tokens(PREFIXES, ENDINGS), expected) <= 1e-5 * expected.abs().max()
    # In bfloat16 no speed may be further from the truth than plain transformers are.
    plain = one_by_one(model_of(architecture, torch.bfloat16, attn_implementation="sdpa"))
    rounded = FrozenLLM.from_model(model_of(architecture, torch.bfloat16), speed=speed)
    found = rounded.embed_tokens(PREFIXES, ENDINGS)
    assert (found - expected).pow(2).mean() <= 1.2 * (plain - expected).pow(2).mean()


def test_compiled_layers_serve_every_length_without_being_compiled_again():
    torch.compiler.reset()
    expected = one_by_one(model_of("mistral", attn_implementation="sdpa"))
    speed = LLMSpeed(fused_norms=True, compile=True, attention="sdpa")
    ours = FrozenLLM.from_model(model_of("mistral"), speed=speed)
    assert gap(ours.embed_tokens(PREFIXES, ENDINGS, token_budget=110), expected) <= 1e-5 * (
        expected.abs().max()
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        for prefixes in (tokens(7, 8, 50), tokens(20, 21), tokens(3), tokens(200, 199, 198, 1, 2)):
            ours.embed_tokens(prefixes, ENDINGS)


def test_norms_are_fused_where_they_compute_the_same_and_nowhere_else():
    for architecture, norms in (("llama", 9), ("mistral", 9), ("gemma3_text", 25)):
        model = model_of(architecture)
        assert fuse_norms(model) == norms
        assert not [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]

    class OtherRMSNorm(nn.Module):
        """As Llama's, but of the mean of absolute values."""

        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    class WrongEpsRMSNorm(nn.RMSNorm):
        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight, 10 * self.eps)

    others = nn.Sequential(OtherRMSNorm(), WrongEpsRMSNorm(8, eps=1e-6))
    assert fuse_norms(others) == 0


def test_a_weight_that_would_be_rounded_is_not_fused():
    """1 + 2 ** -12 is 1 in bfloat16; Gemma adds in float32."""
    model = model_of("gemma3_text", torch.bfloat16)
    with torch.no_grad():
        model.norm.weight.fill_(2**-12)
    fuse_norms(model)
    assert not isinstance(model.norm, FusedNorm)
    assert isinstance(model.layers[0].input_layernorm, FusedNorm)


def test_grouped_attention_is_masked_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    visible = facet_mask(2, [1, 2])[2:].expand(2, 1, -1, -1)
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(
        grouped_attention(query, key, value, mask.repeat(1, 1, 2, 1), scaling=0.3),
        masked_attention(query, key, value, mask, scaling=0.3),
    )


def test_a_random_llm_of_a_given_shape_needs_no_files():
    llm = FrozenLLM.random(config("mistral"), dtype=torch.float32, device="cpu")
    assert llm.embed_tokens(PREFIXES, ENDINGS).shape == (len(PREFIXES), len(ENDINGS), 64)
    assert llm.options == AS_PUBLISHED


def test_a_cpu_computes_as_before_there_were_speed_settings():
    assert LLMSpeed.of(torch.device("cpu")) == LLMSpeed()
    assert LLMSpeed.of(torch.device("cuda")).fused_norms
