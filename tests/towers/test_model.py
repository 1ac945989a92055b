"""The tower: what it computes, refuses, saves and loads."""

import pytest
import torch

from flame.study.schema.runs import Backbone, Recipe
from flame.study.settings import FlameTraining
from flame.towers import model
from flame.towers.model import FlameTower

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


def test_unknown_argument_of_a_backbone_is_refused():
    with pytest.raises(ValueError, match=r"resnet10t.*depthh"):
        FlameTower(Backbone(timm="resnet10t", image_size=32, args={"depthh": 3}), recipe(), 24)


def test_scale_begins_at_one_over_tau_and_is_clamped():
    tower = FlameTower(CNN, recipe(tau=0.07, max_scale=100), 24)
    assert tower.log_scale.exp().item() == pytest.approx(1 / 0.07)
    for wild, tame in ((9.0, 100.0), (-1.0, 1.0)):
        tower.log_scale.data.fill_(wild)
        tower.clamp_scale()
        assert tower.log_scale.exp().item() == pytest.approx(tame)


def test_bias_is_trained_by_the_sigmoid_loss_only():
    assert not FlameTower(CNN, recipe(), 24).bias.requires_grad
    assert FlameTower(CNN, recipe(loss="sigmoid"), 24).bias.requires_grad


def test_loaded_tower_equals_the_saved_one(tmp_path):
    settings = FlameTraining(
        run="run",
        seed=0,
        dataset="scenes",
        backbone=CNN,
        recipe=recipe(),
        targets={"long": ("scene",)},
        max_skipped=0.0,
        version=1,
    )
    tower = FlameTower(CNN, settings.recipe, 24)
    tower.centers = {"long": {"scene": torch.rand(24), "a/b.c": torch.rand(24)}}
    model.save(tower, tmp_path, {"settings": settings.model_dump(mode="json"), "dim": 24})
    loaded, record = model.load(tmp_path)
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded.encode_image(images), tower.eval().encode_image(images))
    assert record["settings"]["run"] == "run"
    assert list(loaded.centers["long"]) == ["a/b.c", "scene"]
    assert torch.equal(loaded.centers["long"]["scene"], tower.centers["long"]["scene"])


def test_kinds_that_weigh_the_same_weigh_so_in_the_loss_of_a_step():
    images, texts = torch.rand(4, 3, 32, 32), torch.randn(4, 3, 24).half()
    losses = {}
    for weigh in ("facets", "kinds"):
        torch.manual_seed(0)
        tower = FlameTower(CNN, recipe(weigh=weigh), 24).eval()
        tower.match([("long", "a"), ("long", "b"), ("raw", "a")])
        columns = torch.tensor([0, 1, 2])
        losses[weigh] = tower.loss(tower(images, texts, columns), columns)
        alone = [
            tower.loss(tower(images, texts[:, k : k + 1], columns[k : k + 1]), columns[k : k + 1])
            for k in range(3)
        ]
    torch.testing.assert_close(losses["facets"], sum(alone) / 3)
    torch.testing.assert_close(losses["kinds"], alone[0] / 4 + alone[1] / 4 + alone[2] / 2)


def test_the_center_of_a_column_is_subtracted_where_there_is_one():
    tower = FlameTower(CNN, recipe(), 4)
    tower.centers = {"long": {"b": torch.tensor([1.0, 2.0, 3.0, 4.0])}}
    tower.match([("raw", "b"), ("long", "a"), ("long", "b")])
    texts = torch.zeros(2, 2, 4).half()
    outputs = tower(torch.rand(2, 3, 32, 32), texts, torch.tensor([1, 2]))
    assert outputs.texts[0].tolist() == [[0.0] * 4, [-1.0, -2.0, -3.0, -4.0]]
    assert "center_rows" not in tower.state_dict()
