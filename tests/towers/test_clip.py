"""The CLIP tower against open_clip's."""

import pytest
import torch

from flame.study.schema.runs import Backbone, Recipe, TextTower
from flame.study.settings import ClipTraining
from flame.towers.clip import ClipTower
from flame.towers.flame import FlameTower

SIZE = 32
# Without BatchNorm, so that a batch may be split among processes.
BACKBONE = Backbone(
    timm="vit_tiny_patch16_224",
    image_size=SIZE,
    args={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
)
TEXT_TOWER = TextTower(width=16, layers=2, heads=2, context_length=12, embed_dim=8)
TEXTS = ["a dog", "two red lanterns above a quiet harbour", "", "wow !_ a cat!"]


def recipe(**changes):
    plain = {"epochs": 1, "batch_size": 4, "lr": 1e-2, "weight_decay": 0.5, "warmup_steps": 1}
    return Recipe(**(plain | changes))


def shared(**changes):
    return {
        "run": "run",
        "seed": 0,
        "dataset": "dots",
        "backbone": BACKBONE,
        "recipe": recipe(**changes),
        "text_tower": TEXT_TOWER,
        "max_skipped": 0.0,
        "version": 1,
    }


def clip_settings(**changes):
    return ClipTraining(method="clip", captions="raw", **shared(**changes))


def clip_tower():
    torch.manual_seed(0)
    return ClipTower(BACKBONE, recipe(), TEXT_TOWER)


@pytest.mark.parametrize("training", [True, False])
def test_text_features_are_open_clips_without_what_stands_behind_the_end(training):
    tower = clip_tower().train(training)
    tokens = tower.tokenize(TEXTS)
    assert tokens.shape == (4, 12)
    # A "!" within a word is token 0, as padding is: only the end token tells where a text ends.
    assert 0 in tokens[3, : tokens[3].argmax()]
    with torch.no_grad():
        features = tower.encode_text(TEXTS)
        torch.testing.assert_close(features, tower.text(tokens), rtol=1e-4, atol=1e-5)
        alone = torch.cat([tower.encode_text([text]) for text in TEXTS])
    assert features.shape == (4, 8)
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)


def test_image_features_are_a_linear_map_of_the_backbones():
    tower = clip_tower().eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    seen = tower.visual((images - tower.mean) / tower.std)
    expected = seen @ tower.projection.weight.T
    torch.testing.assert_close(tower.encode_image(images), expected)
    flame = FlameTower(BACKBONE, recipe(), 8)
    assert torch.equal(tower.mean, flame.mean)
    assert torch.equal(tower.std, flame.std)
