"""The tower of FLAME: what it computes and refuses."""

import pytest
import torch

from flame.study.schema.runs import Backbone, Recipe
from flame.towers.flame import FlameTower

CNN = Backbone(timm="resnet10t", image_size=32, args={"channels": [8, 8, 8, 16], "stem_width": 4})
VIT = Backbone(
    timm="vit_tiny_patch16_224",
    image_size=32,
    args={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
)


def recipe(**changes):
    plain = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 1}
    return Recipe(**(plain | changes))


@pytest.mark.parametrize(
    ("backbone", "projector"), [(CNN, "pooled"), (VIT, "pooled"), (VIT, "per_token")]
)
def test_features_have_the_width_of_the_texts(backbone, projector):
    tower = FlameTower(backbone, recipe(projector=projector), 24)
    assert tower.encode_image(torch.rand(2, 3, 32, 32)).shape == (2, 24)


def test_per_token_is_the_mean_of_the_projected_patches():
    tower = FlameTower(VIT, recipe(projector="per_token"), 24).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = tower.visual.forward_features((images - tower.mean) / tower.std)
    assert tokens.shape == (2, 1 + 4, 16)  # a class token, 2 x 2 patches
    expected = sum(tower.projector(tokens[:, i]) for i in (1, 2, 3, 4)) / 4
    torch.testing.assert_close(tower.encode_image(images), expected)


def test_per_token_needs_tokens():
    with pytest.raises(ValueError, match=r"per_token.*not 'resnet10t'.*pooled"):
        FlameTower(CNN, recipe(projector="per_token"), 24)


def test_the_center_of_a_column_is_subtracted_where_there_is_one():
    tower = FlameTower(CNN, recipe(), 4)
    tower.centers = {"long": {"b": torch.tensor([1.0, 2.0, 3.0, 4.0])}}
    tower.match([("raw", "b"), ("long", "a"), ("long", "b")])
    texts = torch.zeros(2, 2, 4).half()
    outputs = tower(torch.rand(2, 3, 32, 32), texts, torch.tensor([1, 2]))
    assert outputs.texts[0].tolist() == [[0.0] * 4, [-1.0, -2.0, -3.0, -4.0]]
    assert "center_rows" not in tower.state_dict()
