"""Vocabulary mapping: feature maps with a known mean, and words that the head must choose."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.embedding import checkpoints, store
from flame.evaluation.vocabulary import (
    STRIDE,
    Place,
    Speaker,
    dilated,
    hidden_states,
    patch_features,
    place,
    pool,
)
from flame.runtime import checksums
from flame.runtime.device import dtype_of
from flame.study.schema.runs import Backbone, Recipe
from flame.study.settings import FlameTraining
from flame.towers.flame import FlameTower

DIM = 24
PLAIN = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 1}
CNN = Backbone(timm="resnet10t", image_size=64, args={"channels": [8, 8, 8, 16], "stem_width": 4})
VIT = Backbone(
    timm="vit_tiny_patch16_224",
    image_size=64,
    args={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
)


def training(backbone: Backbone, **changes) -> FlameTraining:
    return FlameTraining(
        run="r",
        seed=0,
        dataset="toy",
        backbone=backbone,
        recipe=Recipe(**(PLAIN | changes)),
        targets={"raw": ("scene",)},
        max_skipped=0,
        version=1,
    )


def new_tower(chosen: FlameTraining) -> FlameTower:
    torch.manual_seed(0)
    tower = FlameTower(chosen.backbone, chosen.recipe, DIM)
    for module in tower.modules():  # at their start, normalisations and residuals would hide much
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
    return tower.eval()


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    """A random LLM over bytes whose head is tied to its token embeddings."""
    out = tmp_path_factory.mktemp("llm")
    checkpoints.random("gemma3_text", out)
    return out


def test_mean_of_a_map_of_tokens_is_the_image_feature():
    tower = new_tower(training(VIT, projector="per_token"))
    images = torch.rand(3, 3, 64, 64)
    features = patch_features(tower, images)
    assert features.shape == (3, 4, 4, DIM)
    torch.testing.assert_close(features.mean(dim=(1, 2)), tower.encode_image(images))


def test_tokens_lie_in_the_map_as_their_patches_in_the_image():
    tower = new_tower(training(VIT, projector="per_token"))
    tower.visual.blocks = torch.nn.Sequential()  # no attention: a patch is seen by its token only
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 16:32, 48:64] += 0.5
    moved = (patch_features(tower, changed) - patch_features(tower, images)).abs().amax(dim=-1)[0]
    assert moved.nonzero().tolist() == [[1, 3]]


def test_pooled_tokens_are_projected_one_by_one():
    tower = new_tower(training(VIT, projector="pooled"))
    images = torch.rand(2, 3, 64, 64)
    tokens = tower.visual.forward_features((images - tower.mean) / tower.std)
    features = patch_features(tower, images)
    torch.testing.assert_close(features[:, 2, 1], tower.projector(tokens[:, 1 + 2 * 4 + 1]))


def test_a_position_of_a_convolutional_map_is_projected_like_the_pooled_map():
    tower = new_tower(training(CNN))
    images = torch.rand(2, 3, 64, 64)
    features = patch_features(tower, images)
    assert features.shape == (2, 2, 2, DIM)
    # At 32 pixels the map has one position, which is its own mean.
    small = images[:, :, :32, :32]
    torch.testing.assert_close(patch_features(tower, small)[:, 0, 0], tower.encode_image(small))
    # Where the projector is linear, the mean of the projections is the projection of the mean.
    tower.projector = torch.nn.Linear(16, DIM)
    mean = patch_features(tower, images).mean(dim=(1, 2))
    torch.testing.assert_close(mean, tower.encode_image(images))


def test_dilated_map_holds_the_plain_one():
    chosen = training(CNN)
    tower = new_tower(chosen)
    finer = dilated(tower, chosen)
    images = torch.rand(2, 3, 64, 64)
    plain, fine = patch_features(tower, images), patch_features(finer, images)
    assert fine.shape == (2, 64 // STRIDE, 64 // STRIDE, DIM)
    torch.testing.assert_close(fine[:, ::2, ::2], plain)
    assert (fine[:, 1::2, 1::2] - plain).abs().max() > 1e-3


def test_a_backbone_that_cannot_be_dilated_keeps_its_map():
    chosen = training(VIT)
    tower = new_tower(chosen)
    assert dilated(tower, chosen) is tower


def test_pool_by_hand():
    features = torch.arange(16.0).view(1, 4, 4, 1)
    assert pool(features, 2)[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert pool(features, 1).item() == 7.5
    assert torch.equal(pool(features, 4), features)
    with pytest.raises(ValueError, match="cannot pool 4 x 4 positions to 5 x 5"):
        pool(features, 5)


def test_place_and_states_by_hand(tmp_path):
    # (1, 2) and (7, 10) are 5 from the center (4, 6) each; (4, 7) is 1 from it.
    vectors = np.array([[1, 2], [7, 10], [4, 7]], dtype=np.float32)
    path = tmp_path / "0.zarr"
    store.create(path, {"kind": "raw", "facets": {"a": "", "b": ""}, "part": 0, "parts": 1})
    writer = store.Writer(path, "toy", keys=["x", "y", "z"], facets=["a", "b"], dim=2)
    (rows,) = writer.missing()
    writer.write(rows, np.stack([np.zeros_like(vectors), vectors], axis=1))
    texts = store.Embeddings.open([path], "toy")
    where = place(texts, "b", torch.tensor([4.0, 6.0]))
    assert where.center.tolist() == [4, 6]
    assert where.radius == pytest.approx(11 / 3)
    torch.testing.assert_close(
        hidden_states(torch.tensor([[0.3, 0.4], [-9.0, 0.0]]), where),
        torch.tensor([[4 + 2.2, 6 + 44 / 15], [4 - 11 / 3, 6.0]]),
    )
    without = place(texts, "b", None)
    assert without.center.tolist() == [0, 0]
    assert without.radius == pytest.approx((5**0.5 + 149**0.5 + 65**0.5) / 3)


def test_the_word_of_a_row_of_the_head_is_its_token(llm):
    speaker = Speaker(llm)
    tokens = torch.tensor(speaker.ids("boat")).view(1, 2, 2)
    where = Place(torch.zeros(speaker.dim), 1000.0)
    # A unit row scores its own norm, and any other row of random directions far less.
    states = hidden_states(normalize(speaker.head, dim=-1)[tokens], where)
    words = speaker.words(states, chunk=3)
    assert torch.equal(words.tokens, tokens)
    assert [speaker.text(token) for token in words.tokens.flatten().tolist()] == list("boat")
    expected = (states @ speaker.head.T).softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(words.probabilities, expected)

    shuffle = torch.randperm(len(speaker.head), generator=torch.Generator().manual_seed(0))
    speaker.head = speaker.head[shuffle]
    wrong = speaker.words(states).tokens
    assert torch.equal(shuffle[wrong], tokens)
    assert (wrong != tokens).all()


def test_words_are_those_of_the_causal_model(llm):
    speaker = Speaker(llm)
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    ids = torch.tensor([speaker.ids("a red apple")])
    with torch.inference_mode():
        states = model.base_model(ids).last_hidden_state
        probabilities = model(ids).logits.softmax(dim=-1)
    words = speaker.words(states[None])
    assert torch.equal(words.tokens[0], probabilities.argmax(dim=-1))
    torch.testing.assert_close(words.probabilities[0], probabilities.amax(dim=-1))


def test_a_bfloat16_checkpoint_speaks_as_transformers_runs_it(llm, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).eval()
    plain.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path)
    speaker = Speaker(tmp_path)
    dtype = dtype_of("auto", speaker.head.device)
    assert {parameter.dtype for parameter in speaker.model.parameters()} == {dtype}
    assert torch.equal(speaker.head, plain.get_output_embeddings().weight.float())
    ids = speaker.start() + speaker.ids("the quick brown fox jumps over the lazy dog")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.inference_mode():
        states = plain.base_model(torch.tensor([ids])).last_hidden_state
    assert torch.equal(speaker.read(ids)[0], states[0, -1].float())


def test_reading_in_pieces_is_reading_at_once(llm):
    speaker = Speaker(llm)
    speaker.model = speaker.model.float()
    ids = speaker.start() + speaker.ids("the quick brown fox jumps over the lazy dog")  # > a window
    whole, _ = speaker.read(ids)
    _, memory = speaker.read(ids[:10])
    state, memory = speaker.read(ids[10:-1], memory)
    state, _ = speaker.read(ids[-1:], memory)
    torch.testing.assert_close(state, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        speaker.scores(state, [5, 3]),
        torch.stack([speaker.head[5] @ state, speaker.head[3] @ state]),
    )


def test_too_long_a_prompt_is_refused(llm):
    speaker = Speaker(llm)
    speaker.max_tokens = 5
    _, memory = speaker.read([1, 2, 3])
    with pytest.raises(ValueError, match="a prompt has 6 tokens, the LLM takes 5"):
        speaker.read([1, 2, 3], memory)


def test_an_llm_without_a_head_is_refused(tmp_path):
    checkpoints.random("gemma3_text", tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text()) | {"tie_word_embeddings": False}
    config.write_text(json.dumps(values))
    checksums.seal(tmp_path)
    with pytest.raises(ValueError, match=r"lacks lm_head.weight: its head would have random"):
        Speaker(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {f"model.{name.removeprefix('model.')}": value for name, value in weights.items()}
    (table,) = [value for name, value in weights.items() if name.endswith("embed_tokens.weight")]
    weights["lm_head.weight"] = -table
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checksums.seal(tmp_path)
    torch.testing.assert_close(Speaker(tmp_path).head, -table)


def test_contrast_takes_the_whole_word_that_is_raised_most(llm, monkeypatch):
    speaker = Speaker(llm)
    pieces = [
        "\u2581the",
        "\u2581taxi",
        "\u2581car",
        "xi",
        "\u2581a",
        "\u0120bus",
        "\u2581b2",
        None,
    ]
    speaker.head = torch.eye(len(pieces))
    monkeypatch.setattr(speaker.tokenizer, "convert_ids_to_tokens", lambda ids: pieces)
    assert speaker.whole.tolist() == [True, True, True, False, False, True, False, False]
    usual = torch.tensor([9.0, 0, 1, 0, 0, 0, 0, 0])
    state = torch.tensor([9.5, 4, 6, 9, 9.9, 1, 9, 9])
    states = state.view(1, 1, 1, -1)

    def word(contrast):
        found = speaker.words(states, center=usual, contrast=contrast)
        token = int(found.tokens)
        assert found.probabilities.item() == pytest.approx(state.softmax(0)[token].item())
        return pieces[token]

    assert word(None) == "\u2581a"  # the most probable token, which is no whole word
    assert word(1.0) == "\u2581the"  # the most probable whole word
    assert word(0.01) == "\u2581car"  # raised by 5; `taxi`, by 4
    assert word(1e-9) == "\u2581car"
    states[..., 2] = 1.0  # `car` is as probable as usual
    assert word(1e-9) == "\u2581taxi"
    assert word(0.01) == "\u2581the"  # `taxi` is not plausible


def test_contrast_needs_whole_words(llm):
    speaker = Speaker(llm)
    states, center = torch.zeros(1, 1, 1, speaker.dim), torch.zeros(speaker.dim)
    with pytest.raises(ValueError, match=r"no token of the LLM is a whole word"):
        speaker.words(states, center=center, contrast=0.1)
