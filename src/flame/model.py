"""The trained side of FLAME: a visual backbone, a two-layer MLP, a temperature (Section 3.1).

Shapes: B images, H and W pixels, C width of the backbone, D width of the text embeddings.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from flame.config import Backbone, Recipe, TrainSettings

# Mean text vectors of the training store: caption kind -> facet -> (D,).
Centers = dict[str, dict[str, Tensor]]

# Initial bias of the release's sigmoid loss: nearly all pairs of a batch are negative.
INITIAL_BIAS = -10.0


class FlameTower(nn.Module):
    """Visual backbone and projector into the space of the text embeddings.

    Attributes:
        dim: D.
        centers: what was subtracted from the text embeddings in training; empty if nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, recipe: Recipe, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.visual: Any = _create_visual(backbone)
        self.per_token = recipe.projector == "per_token"
        if self.per_token and not hasattr(self.visual, "num_prefix_tokens"):
            raise ValueError(
                f"projector 'per_token' needs a backbone of tokens such as a ViT, "
                f"not {backbone.timm!r}; known for it: 'pooled'"
            )
        hidden = recipe.projector_width or dim
        width = self.visual.num_features if self.per_token else self.visual.head_hidden_size
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            nn.LayerNorm(dim) if self.per_token else nn.Identity(),
        )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(recipe.tau)))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS), requires_grad=recipe.loss == "sigmoid")
        self.max_log_scale = math.log(recipe.max_scale)
        self.centers: Centers = {}
        pixels = resolve_model_data_config(self.visual)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(pixels[name]).view(3, 1, 1))
        # Convolutions are faster in this layout, on CPUs and on GPUs.
        self.to(memory_format=torch.channels_last)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D), not normalised: both losses and all tasks take cosines.

        Args:
            images: (B, 3, H, W) pixels in [0, 1]; backbone statistics are applied here.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        images = (images - self.mean) / self.std
        if not self.per_token:
            return self.projector(self.visual(images))
        tokens = self.visual.forward_features(images)[:, self.visual.num_prefix_tokens :]
        return self.projector(tokens).mean(dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image features (B, D), 1/tau () and bias (): what a loss needs."""
        return self.encode_image(images), self.log_scale.exp(), self.bias

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep 1/tau within [1, max_scale]; to be called after every step."""
        self.log_scale.clamp_(0.0, self.max_log_scale)


def save(tower: FlameTower, folder: Path, record: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `run.json`, all that `load` needs.

    Args:
        tower: the trained tower.
        folder: an existing folder.
        record: what is told about the run; has the settings (as `TrainSettings`) and `dim`.
    """
    tensors = {name: value.contiguous() for name, value in tower.state_dict().items()}
    for kind, facets in tower.centers.items():
        tensors |= {f"centers/{kind}/{facet}": vector for facet, vector in facets.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def load(folder: Path) -> tuple[FlameTower, dict[str, Any]]:
    """A trained tower in evaluation mode, and the record of its run."""
    record = json.loads((folder / "run.json").read_text())
    settings = TrainSettings.model_validate(record["settings"])
    tower = FlameTower(settings.backbone, settings.recipe, record["dim"])
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.startswith("centers/")]:
        _, kind, facet = name.split("/", 2)
        tower.centers.setdefault(kind, {})[facet] = tensors.pop(name)
    tower.load_state_dict(tensors)
    return tower.eval(), record


def _create_visual(backbone: Backbone) -> Any:
    args = dict(backbone.args)
    # Models whose weights depend on the image size (position embeddings) must be told it.
    pretrained = timm.get_pretrained_cfg(backbone.timm)
    if pretrained and pretrained.fixed_input_size:
        args.setdefault("img_size", backbone.image_size)
    try:
        return timm.create_model(backbone.timm, num_classes=0, in_chans=3, **args)
    except TypeError as error:
        raise ValueError(f"backbone {backbone.timm!r}, args {backbone.args}: {error}") from error
