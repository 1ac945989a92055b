"""A checkpoint of the official release, as a tower of ours, has the features of the release."""

import pickle
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn

from flame.study.schema.runs import Backbone, HubFile, Recipe
from flame.study.settings import FlameTraining, ReleasedTower
from flame.towers import released
from flame.towers.load import load, save

WIDTH, DIM = 32, 48


class Release(nn.Module):
    """The image tower of the release, in terms of open_clip's ViT and plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer(
            image_size=32, patch_size=8, width=WIDTH, layers=2, heads=2, mlp_ratio=4,
            output_dim=16, output_tokens=True, pool_type="avg",
        )  # fmt: skip
        self.mm = nn.Sequential(
            nn.Linear(WIDTH, DIM), nn.GELU(), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.logit_bias = nn.Parameter(torch.tensor(-9.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.visual._embeds(images)
        tokens = self.visual.transformer(tokens)  # all tokens, without the final norm
        return self.mm(tokens)[:, 1:].mean(dim=1)


def release_settings(**changes) -> ReleasedTower:
    args = {
        "img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2,
        "final_norm": False,
    }  # fmt: skip
    training = FlameTraining(
        run="released",
        seed=0,
        dataset="cc3m",
        backbone=Backbone(timm="vit_base_patch16_clip_224", image_size=32, args=args | changes),
        recipe=Recipe(
            epochs=1,
            batch_size=4,
            lr=1,
            weight_decay=0,
            warmup_steps=0,
            loss="sigmoid",
            projector="per_token",
        ),
        targets={"long": ("scene",)},
        max_skipped=0,
        version=1,
    )
    weights = HubFile(id="a/b", revision="c", file="flame.pt")
    return ReleasedTower(method="released", training=training, weights=weights, version=1)


def release_weights(path: Path) -> Release:
    """Write a checkpoint in the format of the release, including parts that we do not read."""
    torch.manual_seed(0)
    own = Release().eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    state = {f"module.{name}": value for name, value in own.state_dict().items()}
    state["module.text.model.embed_tokens.weight"] = torch.zeros(3, 3)
    torch.save({"epoch": 32, "state_dict": state}, path)
    return own


@pytest.fixture
def release(tmp_path) -> tuple[Release, Path]:
    path = tmp_path / "flame.pt"
    return release_weights(path), path


def test_the_released_checkpoint_gives_the_features_of_the_release(release, tmp_path):
    own, path = release
    out = tmp_path / "tower"
    out.mkdir()
    converted, made = released.convert(path, release_settings())
    save(converted, out, made)
    tower, record = load(out)
    assert record["origin"] == "hub:a/b@c/flame.pt"
    images = torch.rand(5, 3, 32, 32)
    with torch.inference_mode():
        theirs = own((images - tower.mean) / tower.std)
        torch.testing.assert_close(tower.encode_image(images), theirs, rtol=0, atol=1e-5)
        assert theirs.std(dim=0).min() > 1e-3  # the features differ between images
    assert tower.log_scale.item() == 2.5
    assert tower.bias.item() == -9.0


def test_a_checkpoint_of_another_shape_is_refused_by_name(release, tmp_path):
    _, path = release
    with pytest.raises(ValueError, match=r"flame\.pt does not fit .* lacks visual\.blocks\.2"):
        released.convert(path, release_settings(depth=3))
    with pytest.raises(ValueError, match=r"visual\.conv1\.weight is \(32, 3, 8, 8\), the study's"):
        released.convert(path, release_settings(patch_size=4, img_size=16))
    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no projector 'mm"):
        released.convert(tmp_path / "other.safetensors", release_settings())


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "done",))

    with (tmp_path / "flame.pt").open("wb") as file:
        pickle.dump({"state_dict": Attack()}, file)
    with pytest.raises(ValueError, match="could run code"):
        released.convert(tmp_path / "flame.pt", release_settings())
    assert not (tmp_path / "done").exists()
