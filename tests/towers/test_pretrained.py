"""Pretrained towers keep their own preprocessing, tokens and features."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
)

from flame.data.pixels import RESIZES, square
from flame.runtime import checksums
from flame.study.schema.runs import OpenClipTower, TransformersTower
from flame.study.settings import PretrainedTower
from flame.towers import pretrained
from flame.towers.load import load

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
    """A tiny model of open_clip, and the tower made of it."""
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
    assert set(RESIZES) == {"fit", "crop", "squash", "fast"}


def chinese_clip(
    source: Path,
) -> tuple[ChineseCLIPModel, BertTokenizerFast, ChineseCLIPImageProcessor]:
    """Write a tiny Chinese-CLIP in the format of transformers."""
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
    with pytest.raises(ValueError) as error:  # noqa: PT011 - checked below
        pretrained.download(
            settings(OpenClipTower(source="open_clip", name=name, tag=tag)), tmp_path
        )
    assert words in str(error.value)
