"""Towers that others trained keep their own pixels, tokens and features; the release's is ours."""

import json
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
)

from flame.data.images import RESIZES, square
from flame.runtime import checksums
from flame.study.schema.runs import Backbone, HubFile, OpenClipTower, Recipe, TransformersTower
from flame.study.settings import FlameTraining, PretrainedTower, ReleasedTower
from flame.towers import pretrained, released
from flame.towers.load import load, save

SHAPES = [(64, 64), (97, 41), (41, 97), (200, 133), (33, 500), (31, 32)]
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
WORDS = ["a red apple", "two dogs on a beach", "a"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SHAPES
    ]


def settings(tower: OpenClipTower | TransformersTower) -> PretrainedTower:
    return PretrainedTower(method="pretrained", run="tiny", tower=tower, licence="none", version=1)


def pixels(pictures: list[Image.Image], size: int, resize: str) -> torch.Tensor:
    squares = np.stack([square(picture, size, resize) for picture in pictures])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module", params=["shortest", "squash"])
def open_clip_tower(request, tmp_path_factory):
    """A tiny model of open_clip, and a tower that was made from it."""
    folder = tmp_path_factory.mktemp("models")
    name = f"tiny-{request.param}"
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    own = open_clip.create_model(name).eval()
    torch.save(own.state_dict(), folder / "weights.pt")
    if request.param == "squash":
        own.visual.preprocess_cfg = {**own.visual.preprocess_cfg, "resize_mode": "squash"}
        pp = {"resize_mode": "squash"}
        (folder / f"{name}.json").write_text(json.dumps(config | {"preprocess_cfg": pp}))
    out = folder / "tower"
    out.mkdir()
    tower = OpenClipTower(source="open_clip", name=name, tag=str(folder / "weights.pt"))
    pretrained.download(settings(tower), out)
    if request.param == "squash":
        path = out / "open_clip_config.json"
        written = json.loads(path.read_text())
        written["preprocess_cfg"]["resize_mode"] = "squash"
        path.write_text(json.dumps(written))
        checksums.seal(out)
    return own, out


def test_a_model_of_open_clip_sees_and_reads_as_open_clip_does(open_clip_tower, pictures):
    own, folder = open_clip_tower
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**own.visual.preprocess_cfg), is_train=False
    )
    theirs = torch.stack([transform(picture) for picture in pictures])
    tower, record = load(folder)
    assert tower.image_size == 32
    assert record["dim"] == tower.dim == 24
    ours = pixels(pictures, tower.image_size, tower.resize)
    torch.testing.assert_close((ours - tower.mean) / tower.std, theirs, rtol=0, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(tower.encode_image(ours), own.encode_image(theirs))
        tokens = open_clip.tokenize(WORDS, context_length=16)
        torch.testing.assert_close(tower.encode_text(WORDS), own.encode_text(tokens))


def test_fit_and_crop_differ_and_squash_keeps_all(pictures):
    corner = Image.new("RGB", (64, 32), "black")
    corner.paste("white", (0, 0, 8, 32))
    assert square(corner, 32, "crop")[:, 0].max() == 0  # the left is cut off
    assert square(corner, 32, "squash")[:, 0].min() > 200
    assert set(RESIZES) == {"fit", "crop", "squash"}


def chinese_clip(
    source: Path,
) -> tuple[ChineseCLIPModel, BertTokenizerFast, ChineseCLIPImageProcessor]:
    """Write a tiny Chinese-CLIP as transformers does."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = ChineseCLIPConfig(
        text_config={**small, "num_attention_heads": 2, "vocab_size": 40},
        vision_config={**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    own = ChineseCLIPModel(config).eval()
    own.save_pretrained(source)
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdeghinoprstw", "红", "苹", "果"]
    vocabulary = source / "vocab.txt"
    vocabulary.write_text("\n".join(letters))
    tokenizer = BertTokenizerFast(str(vocabulary))
    tokenizer.save_pretrained(source)
    processor = ChineseCLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor.save_pretrained(source)
    return own, tokenizer, processor


def test_a_chinese_clip_sees_and_reads_as_transformers_does(tmp_path, pictures):
    source, out = tmp_path / "source", tmp_path / "tower"
    own, tokenizer, processor = chinese_clip(source)
    out.mkdir()
    pretrained.download(settings(TransformersTower(source="transformers", id=str(source))), out)
    tower, _ = load(out)
    assert tower.resize == "squash"
    theirs = processor(images=pictures, return_tensors="pt")["pixel_values"]
    ours = pixels(pictures, tower.image_size, tower.resize)
    # transformers resizes tensors, we resize as PIL does: at most a few of 255 levels apart.
    apart = ((ours - tower.mean) / tower.std - theirs).abs()
    assert apart.max() < 0.1
    assert apart.mean() < 0.01
    texts = ["红苹果", "a b c"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(
            tower.encode_image(ours),
            own.get_image_features(pixel_values=(ours - tower.mean) / tower.std).pooler_output,
        )
        torch.testing.assert_close(
            tower.encode_text(texts), own.get_text_features(**tokens).pooler_output
        )


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        ("ViT-B-16", "openai", "trained with QuickGELU: use the model 'ViT-B-16-quickgelu'"),
        ("ViT-B-99", "openai", "open_clip has no model 'ViT-B-99' (did you mean 'ViT-B-"),
        ("ViT-B-16", "opanai", "no weights of 'ViT-B-16' 'opanai' (did you mean 'openai'?)"),
    ],
)
def test_a_tower_that_is_not_there_is_told_before_anything_is_fetched(name, tag, words, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are looked at below
        pretrained.download(
            settings(OpenClipTower(source="open_clip", name=name, tag=tag)), tmp_path
        )
    assert words in str(error.value)


# --- the official release ----------------------------------------------------------------------

WIDTH, DIM = 32, 48


class Release(nn.Module):
    """What the release's image tower does, told by open_clip's own ViT and by plain torch."""

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
        tokens = self.visual.transformer(tokens)  # all of them, without the final norm
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
    """Write a checkpoint as the release's training does, with parts that we do not read."""
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
        assert theirs.std(dim=0).min() > 1e-3  # the features do differ
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
