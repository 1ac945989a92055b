"""Cost of captioning, embedding and training in tokens, FLOP and bytes, by formula.

Symbols: P tokens of the prefix (template and caption), S tokens of a facet's suffix, K facets, L
layers, D width. A FLOP is one multiplication or one addition.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flame.study.settings import FlameTraining, LongClipTraining, Training
from flame.study.shapes import Shape
from flame.towers.load import create

# Tokens of a caption with its template, from the caption lengths that DreamLIP published.
PREFIX_TOKENS = {"raw": 19, "short": 29, "long": 153}
OTHER_PREFIX_TOKENS = 19  # class texts, pairs of captions
SUFFIX_TOKENS = 16
CLIP_TOKENS = 77
ACTIVATION_BYTES = 34  # per token, layer and unit of width, bfloat16 (arXiv 2205.05198, Section 4)


def embedding_flop(shape: Shape, prefix: int, suffix: int, facets: int, *, passes: bool) -> float:
    """FLOP of embedding one caption under K facets.

    Args:
        shape: sizes of the LLM.
        prefix: P.
        suffix: S.
        facets: K.
        passes: one pass per facet, instead of a single pass in which the facets share the prefix.
    """
    per_token = 2 * shape.layers * shape.layer_parameters
    per_pair = 4 * shape.layers * shape.heads * shape.head_dim
    if passes:
        tokens = prefix + suffix
        return facets * (per_token * tokens + per_pair * tokens * (tokens + 1) / 2)
    own = suffix * prefix + suffix * (suffix + 1) / 2
    pairs = prefix * (prefix + 1) / 2 + facets * own
    return per_token * (prefix + facets * suffix) + per_pair * pairs


def store_bytes(rows: int, facets: int, width: int) -> dict[str, int]:
    """Bytes of a store per number format, checksums of the vectors included."""
    values, checksums = rows * facets * width, 4 * rows * facets
    sizes = {
        "float16": 2 * values,
        "fp8": values + 2 * rows * facets,
        "int8": values + 4 * facets * width,
    }
    return {name: size + checksums for name, size in sizes.items()}


@dataclass(frozen=True)
class TowerCost:
    """Cost of training a tower.

    Args:
        forward: FLOP of the forward pass for one image, and its texts where they are encoded.
        parameters: number of trained parameters.
        activations: bytes per image kept for the backward pass.
    """

    forward: float
    parameters: int
    activations: float


def tower_cost(settings: Training, dim: int) -> TowerCost:
    """Cost of a tower, counted on the meta device.

    Args:
        settings: settings of the training.
        dim: D of the LLM; unused for CLIP.
    """
    size = settings.backbone.image_size
    with torch.device("meta"):
        tower = create(settings, dim)
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.encode_image(images)
    parameters = sum(p.numel() for p in tower.parameters())
    tokens, width, layers = _tokens(tower.visual, size)
    forward = float(counter.get_total_flops())
    activations = ACTIVATION_BYTES * tokens * width * layers
    if not isinstance(settings, FlameTraining):
        lengths: tuple[int, ...] = (CLIP_TOKENS,)
        if isinstance(settings, LongClipTraining):  # a long and a short caption
            lengths = (settings.context_length, settings.context_length)
        text = settings.text_tower
        weights = 12 * text.layers * text.width**2
        pairs = 4 * text.layers * text.width
        forward += sum(2 * weights * n + pairs * n * n for n in lengths)
        activations += sum(ACTIVATION_BYTES * n * text.width * text.layers for n in lengths)
    return TowerCost(forward, parameters, activations)


def _tokens(visual: Any, size: int) -> tuple[int, int, int]:
    """Tokens, width and layers of a ViT; for other backbones, those of a ViT of the same width."""
    if hasattr(visual, "patch_embed") and hasattr(visual, "blocks"):
        patches = visual.patch_embed.num_patches + visual.num_prefix_tokens
        return patches, visual.embed_dim, len(visual.blocks)
    return (size // 16) ** 2, visual.num_features, 12
