"""The claim of Section 3.3: one pass over all facets gives what one pass per facet gives."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from flame.embedding import attention, checkpoints
from flame.embedding.llm import AS_PUBLISHED, FrozenLLM, plan

ROOT = Path(__file__).parents[2]
PREFIX = ('Detailed image description: "', '". After thinking step by step,')
SUFFIXES = [
    f' {part} means in just one word:"'
    for part in (
        "the category of the main object in this image",
        "this image description",
        "the overall atmosphere or emotion of this image",
    )
]
CAPTIONS = [
    "",
    "a red apple",
    "He said \"stop!\",\nthen\tleft. 'Why?' <|im_end|> <s> <bos>",
    "\N{BALLOON}\N{CAT FACE} \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} caf\u00e9",
    "\u4e00\u53ea\u732b\u5750\u5728\u57a3\u5b50\u4e0a "
    "\u0642\u0637\u0629 \u0915\u0941\u0924\u094d\u0924\u093e",
    "A large green cat sits to the left of a small blue boat under a rainy evening sky. " * 4,
]
# As wide as the window, one more, and 2,000: captions of bytes are that many tokens.
LONG = ["x" * 32, "y" * 33, "the quick brown fox " * 100]
RANDOM = [("llama", 2), ("mistral", 3), ("gemma3_text", 4)]


@pytest.fixture(scope="session")
def random_llm(tmp_path_factory):
    def make(architecture: str, layers: int) -> Path:
        out = root / architecture
        if not out.exists():
            checkpoints.random(architecture, out, layers=layers)
        return out

    root = tmp_path_factory.mktemp("llms")
    return make


def one_by_one(encoder, checkpoint, captions, *, layer=None, final_norm=True, dtype=torch.float32):
    """(N, K, D): plain transformers, one caption and one facet at a time, unpadded, no cache."""
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").eval()
    if layer is not None:
        model.layers = model.layers[:layer]
    if not final_norm:
        model.norm = torch.nn.Identity()
    tokenizer = encoder.tokenizer
    bos = [tokenizer.bos_token_id] if tokenizer("").input_ids else []
    rows = []
    for caption in captions:
        for suffix in SUFFIXES:
            text = PREFIX[0] + caption + PREFIX[1] + suffix
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            with torch.inference_mode():
                rows.append(model(torch.tensor([bos + ids])).last_hidden_state[0, -1].float())
    return torch.stack(rows).unflatten(0, (len(captions), -1))


def reading(**options):
    return AS_PUBLISHED.model_copy(update=options)


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize(("architecture", "layers"), RANDOM)
def test_one_pass_equals_one_pass_per_facet(random_llm, architecture, layers):
    checkpoint = random_llm(architecture, layers)
    encoder = FrozenLLM(checkpoint, dtype="float32")
    ours = encoder.embed(CAPTIONS + LONG, PREFIX, SUFFIXES)
    assert gap(ours, one_by_one(encoder, checkpoint, CAPTIONS + LONG)) <= 1e-4


def test_one_pass_equals_one_pass_per_facet_in_smollm2(smollm2):
    encoder = FrozenLLM(smollm2, dtype="float32")
    captions = [*CAPTIONS[2:], "boat " * 600]
    expected = one_by_one(encoder, smollm2, captions)
    assert gap(encoder.embed(captions, PREFIX, SUFFIXES), expected) <= 1e-4
    rounded = FrozenLLM(smollm2, dtype="bfloat16").embed(CAPTIONS, PREFIX, SUFFIXES)
    plain = one_by_one(encoder, smollm2, CAPTIONS, dtype=torch.bfloat16)
    assert torch.cosine_similarity(rounded, plain, dim=-1).min() >= 0.9995


@pytest.mark.parametrize(("architecture", "layers"), RANDOM)
@pytest.mark.parametrize(("layer", "final_norm"), [(1, True), (2, False)])
def test_hidden_layer_and_norm_can_be_chosen(random_llm, architecture, layers, layer, final_norm):
    checkpoint = random_llm(architecture, layers)
    encoder = FrozenLLM(checkpoint, reading(layer=layer, final_norm=final_norm), dtype="float32")
    ours = encoder.embed(CAPTIONS, PREFIX, SUFFIXES)
    expected = one_by_one(encoder, checkpoint, CAPTIONS, layer=layer, final_norm=final_norm)
    assert gap(ours, expected) <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("token_budget", [1, 500, 100_000])
def test_batches_change_nothing(random_llm, token_budget):
    encoder = FrozenLLM(random_llm("gemma3_text", 4), dtype="float32")
    done = []
    whole = encoder.embed(CAPTIONS + LONG[:2], PREFIX, SUFFIXES)
    split = encoder.embed(
        (CAPTIONS + LONG[:2])[::-1],
        PREFIX,
        SUFFIXES,
        token_budget=token_budget,
        on_batch=done.append,
    )
    assert gap(whole, split.flip(0)) <= 1e-4
    assert sum(done) == len(whole)
    assert gap(encoder.embed(CAPTIONS, PREFIX, SUFFIXES[1:2]), whole[: len(CAPTIONS), 1:2]) <= 1e-4


def test_running_positions_are_another_embedding(random_llm):
    checkpoint = random_llm("mistral", 3)
    restart = FrozenLLM(checkpoint, dtype="float32").embed(CAPTIONS, PREFIX, SUFFIXES)
    running = FrozenLLM(checkpoint, reading(positions="running"), dtype="float32").embed(
        CAPTIONS, PREFIX, SUFFIXES
    )
    assert gap(restart[:, 0], running[:, 0]) <= 1e-4
    assert gap(restart[:, 1:], running[:, 1:]) > 1e-2


def test_a_leaking_mask_would_be_seen(random_llm, monkeypatch):
    encoder = FrozenLLM(random_llm("llama", 2), dtype="float32")
    expected = encoder.embed(CAPTIONS, PREFIX, SUFFIXES)
    monkeypatch.setattr(
        attention,
        "facet_mask",
        lambda p, s: torch.ones(p + sum(s), p + sum(s), dtype=torch.bool).tril(),
    )
    assert gap(encoder.embed(CAPTIONS, PREFIX, SUFFIXES)[:, 1:], expected[:, 1:]) > 1e-2


def test_a_special_token_in_a_caption_is_text(smollm2):
    encoder = FrozenLLM(smollm2)
    (ids,) = encoder._tokenize(["<|im_end|>"]).input_ids
    assert len(ids) > 1
    assert encoder.tokenizer.decode(ids) == "<|im_end|>"


def test_truncate_cuts_the_caption_only(random_llm):
    encoder = FrozenLLM(random_llm("llama", 2))
    assert encoder.truncate(["abcdef", "abc", ""], 3) == (["abc", "abc", ""], 1)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        encoder.truncate(["a"], 0)


def test_captions_are_cleaned_and_then_truncated_if_the_options_say_so(random_llm):
    captions = ["a dog", "abcde"]
    for options, expected in (
        ({}, (captions, 0)),
        ({"cleanup": "release"}, (["a dog.", "abcde."], 0)),
        ({"max_caption_tokens": 5}, (captions, 0)),
        ({"max_caption_tokens": 5, "cleanup": "release"}, (["a dog", "abcde"], 2)),
    ):
        assert FrozenLLM(random_llm("llama", 2), reading(**options)).prepare(captions) == expected


def test_nothing_to_embed(random_llm):
    encoder = FrozenLLM(random_llm("llama", 2))
    assert encoder.embed([], PREFIX, SUFFIXES).shape == (0, 3, encoder.dim)


def test_plan_keeps_the_budget_and_every_row():
    batches = plan([5, 90, 7, 6, 300], suffix_len=10, token_budget=100)
    assert batches == [[4], [1], [2, 3, 0]]


@pytest.mark.parametrize("layer", [0, 3])
def test_unknown_layer_is_refused(random_llm, layer):
    with pytest.raises(ValueError, match=f"layer {layer} of an LLM with layers 1 to 2"):
        FrozenLLM(random_llm("llama", 2), reading(layer=layer))


def test_too_long_a_caption_is_refused(random_llm):
    encoder = FrozenLLM(random_llm("llama", 2))
    with pytest.raises(ValueError, match="set max_caption_tokens"):
        encoder.embed(["a" * 9000], PREFIX, SUFFIXES)
