"""Sizes of models, known before they are downloaded or created, and without importing torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.study import files
from flame.study.schema.llms import HubCheckpoint, RandomCheckpoint
from flame.study.schema.runs import Backbone, ClipRun, FlameRun, LongClipRun, PretrainedRun
from flame.study.study import Study


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder that determine its cost.

    Args:
        layers: L.
        width: D.
        heads: number of query heads.
        head_dim: width of a head.
        key_heads: number of key-value heads.
        hidden: width of the gated MLP.
        vocabulary: number of tokens.
    """

    layers: int
    width: int
    heads: int
    head_dim: int
    key_heads: int
    hidden: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms excluded."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.key_heads)
        return attention + 3 * self.width * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, embedding and head included."""
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.width


# From the models' own configurations, for LLMs that are not downloaded yet.
SHAPES = {
    "mistralai/Mistral-Nemo-Instruct-2407": Shape(40, 5120, 32, 128, 8, 14336, 131072),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(32, 4096, 32, 128, 8, 14336, 32768),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 32, 128, 8, 14336, 128256),
}
# Taken for an LLM from PyPI until it is downloaded: Gemma 3 270M, the largest in our studies.
SMALL = Shape(18, 640, 4, 256, 1, 2048, 262144)
# Taken for an LLM from the hub that is not in the table: Mistral-Nemo, the largest in our studies.
LARGE = SHAPES["mistralai/Mistral-Nemo-Instruct-2407"]


def shape_of(folder: Path) -> Shape | None:
    """Sizes of a downloaded LLM; None if it has not been downloaded."""
    if not (folder / "config.json").exists():
        return None
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        key_heads=config.get("num_key_value_heads") or heads,
        hidden=config["intermediate_size"],
        vocabulary=config["vocab_size"],
    )


def published_shape(study: Study, llm: str) -> Shape | None:
    """Sizes of an LLM: from its files if they are here, else as published, else None."""
    checkpoint = study.llms[llm].checkpoint
    there = shape_of(Path(files.llm(llm)))
    if there is None and isinstance(checkpoint, HubCheckpoint):
        return SHAPES.get(checkpoint.id)
    return there


def assumed_shape(study: Study, llm: str) -> Shape:
    """The same, and for an LLM of unknown sizes those of one that is rather too large."""
    known, checkpoint = published_shape(study, llm), study.llms[llm].checkpoint
    if known is not None:
        return known
    if isinstance(checkpoint, RandomCheckpoint):
        width = checkpoint.width
        return Shape(checkpoint.layers, width, 4, width // 4, 2, 2 * width, 257)
    return SMALL if checkpoint.source == "package" else LARGE


# --- towers ---------------------------------------------------------------------------------

# Width and layers of timm's vision transformers, as in the ViT and CLIP papers.
VITS = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24),
        "huge": (1280, 32), "giant": (1408, 40)}  # fmt: skip
# Millions of parameters of pretrained towers, from open_clip's table of profiles and the models'
# own files; those of the largest for a tower that is not listed.
PRETRAINED = {
    "ViT-B-16-quickgelu": 150,
    "ViT-L-14-quickgelu": 428,
    "nllb-clip-base": 502,
    "nllb-clip-large": 1399,
    "ViT-B-16-SigLIP-i18n-256": 371,
    "OFA-Sys/chinese-clip-vit-base-patch16": 188,
    "OFA-Sys/chinese-clip-vit-large-patch14": 406,
}
CONVOLUTIONAL = 30_000_000  # parameters of a backbone that is not a ViT: ResNet-50 has 26 million
BYTE_PAIRS = 49_408  # CLIP's vocabulary
PRETRAINED_WIDTH = 1024  # of the features of a pretrained tower, at most


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a visual tower, with its text tower where it has one.

    Args:
        parameters: number of them.
        image_size: side of the input in pixels.
        width: d, of its features.
        values: numbers that the layers of the visual backbone put out for one image.
    """

    parameters: int
    image_size: int
    width: int
    values: int


def tower_shape(study: Study, training: str) -> TowerShape:
    """Sizes of a tower that is trained here or downloaded."""
    run = study.run(training)
    if isinstance(run, PretrainedRun):
        name = str(getattr(run.tower, "name", getattr(run.tower, "id", "")))
        millions = PRETRAINED.get(name, max(PRETRAINED.values()))
        return TowerShape(millions * 1_000_000, 384, PRETRAINED_WIDTH, 12 * 577 * 1024)
    clip = study.runs[run.base] if isinstance(run, LongClipRun) else run
    assert isinstance(clip, FlameRun | ClipRun)
    backbone = study.backbones[clip.backbone]
    width, parameters, values = _visual(backbone)
    if isinstance(clip, FlameRun):
        dim = assumed_shape(study, clip.llm).width
        hidden = study.recipes[clip.recipe].projector_width or dim
        parameters += width * hidden + hidden * dim
        return TowerShape(parameters, backbone.image_size, dim, values)
    text = study.text_towers[clip.text_tower]
    parameters += 12 * text.layers * text.width**2 + BYTE_PAIRS * text.width
    return TowerShape(parameters, backbone.image_size, text.embed_dim, values)


def _visual(backbone: Backbone) -> tuple[int, int, int]:
    """Width, parameters, and values for one image of a visual backbone."""
    size = backbone.image_size
    found = re.match(rf"vit_({'|'.join(VITS)})_patch(\d+)", backbone.timm)
    if not found:  # the first stage of a ResNet puts out the most: 64 channels at half the size
        return 2048, CONVOLUTIONAL, 64 * size**2
    (width, layers), patch = VITS[found[1]], int(found[2])
    tokens = (size // patch) ** 2 + 1
    parameters = 12 * layers * width**2 + (3 * patch**2 + tokens) * width
    return width, parameters, layers * tokens * width
