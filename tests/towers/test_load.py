"""Towers that are saved are loaded as they were."""

import pytest
import torch

from flame.study.settings import FlameTraining
from flame.towers.flame import FlameTower
from flame.towers.load import create, load, save
from tests.towers.test_clip import SIZE, TEXTS, clip_settings
from tests.towers.test_flame import CNN, recipe
from tests.towers.test_long_clip import long_settings


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
    save(tower, tmp_path, {"settings": settings.model_dump(mode="json"), "dim": 24})
    loaded, record = load(tmp_path)
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded.encode_image(images), tower.eval().encode_image(images))
    assert record["settings"]["run"] == "run"
    assert list(loaded.centers["long"]) == ["a/b.c", "scene"]
    assert torch.equal(loaded.centers["long"]["scene"], tower.centers["long"]["scene"])


@pytest.mark.parametrize("settings", [clip_settings(), long_settings()])
def test_loaded_baseline_equals_the_saved_one(tmp_path, settings):
    tower = create(settings).eval()
    record = {"settings": settings.model_dump(mode="json"), "dim": tower.dim}
    save(tower, tmp_path, record)
    loaded, found = load(tmp_path)
    assert type(loaded) is type(tower)
    assert found == record
    assert not loaded.training
    assert loaded.centers == {}
    images = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(loaded.encode_image(images), tower.encode_image(images))
    assert torch.equal(loaded.encode_text(TEXTS), tower.encode_text(TEXTS))
