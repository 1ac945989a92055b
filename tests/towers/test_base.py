"""What all towers share: the backbone, the temperature, the bias."""

import pytest

from flame.study.schema.runs import Backbone
from flame.towers.flame import FlameTower
from tests.towers.test_flame import CNN, recipe


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
