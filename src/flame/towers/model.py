"""Towers: what every method trains, and the trained side of FLAME (Section 3.1).

Shapes: B images, K texts of each, H and W pixels, D width of the space where they meet.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from flame.runtime.checksums import read_json, seal, verified
from flame.study.schema.runs import Backbone, Recipe
from flame.study.settings import AnyTower, FlameTraining, PretrainedTower, Training
from flame.training.loss import criterion, kind_weights

# Mean text vectors of the training store: caption kind -> facet -> (D,).
Centers = dict[str, dict[str, Tensor]]

# Initial bias of the release's sigmoid loss: nearly all pairs of a batch are negative.
INITIAL_BIAS = -10.0


class Outputs(NamedTuple):
    """What a loss needs of one step."""

    images: Tensor  # (B, D)
    texts: Tensor  # (B, K, D)
    scale: Tensor  # () 1/tau
    bias: Tensor  # ()


class Tower(nn.Module):
    """What the towers of all methods share: visual backbone, temperature, loss.

    A method adds `encode_image` and `forward`.

    Attributes:
        dim: D.
        image_size: pixels, both sides.
        resize: how images become squares; a name of `flame.data.images.RESIZES`.
        centers: what was subtracted from the text embeddings in training; empty if nothing.
        facets: (caption kind, facet) of every column of a training batch; empty before `match`.
    """

    mean: Tensor
    std: Tensor
    resize = "fit"

    def __init__(self, backbone: Backbone, recipe: Recipe, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.image_size = backbone.image_size
        self.visual: Any = _create_visual(backbone)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(recipe.tau)))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS), requires_grad=recipe.loss == "sigmoid")
        self.max_log_scale = math.log(recipe.max_scale)
        self.criterion = criterion(recipe)
        self.weigh = recipe.weigh
        self.centers: Centers = {}
        self.facets: Sequence[tuple[str, str]] = ()
        pixels = resolve_model_data_config(self.visual)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(pixels[name]).view(3, 1, 1))
        # Convolutions are faster in this layout, on CPUs and on GPUs.
        self.visual.to(memory_format=torch.channels_last)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D), not normalised: all losses and all tasks take cosines.

        Args:
            images: (B, 3, H, W) pixels in [0, 1]; backbone statistics are applied here.
        """
        raise NotImplementedError

    def forward(self, images: Tensor, texts: Tensor, columns: Tensor) -> Outputs:
        """Features of a batch; the part of a step that may be computed in bfloat16.

        Args:
            images: (B, 3, H, W) pixels in [0, 1].
            texts: (B, K, ...) what the method's store holds of each image.
            columns: (K,) int64, which of `facets` the K are.
        """
        raise NotImplementedError

    def match(self, facets: Sequence[tuple[str, str]]) -> None:
        """Be told what the columns of the batches are; to be called before training."""
        self.facets = facets

    def loss(self, outputs: Outputs, columns: Tensor) -> Tensor:
        """Loss () of a step, in float32.

        Args:
            outputs: of `forward`.
            columns: (K,), as given to `forward`.
        """
        return self.criterion(
            outputs.images.float(),
            outputs.texts.float(),
            outputs.scale,
            outputs.bias,
            self._weights(columns),
        )

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep 1/tau within [1, max_scale]; to be called after every step."""
        self.log_scale.clamp_(0.0, self.max_log_scale)

    def _weights(self, columns: Tensor) -> Tensor | None:
        """(K,) share of each facet of a step in its loss; None where all facets count the same."""
        if self.weigh == "facets":
            return None
        kinds = [self.facets[column][0] for column in columns.tolist()]
        return kind_weights(kinds).to(self.log_scale.device)

    def _pixels(self, images: Tensor) -> Tensor:
        """Images as the backbone wants them."""
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.std


class FlameTower(Tower):
    """Visual backbone and two-layer MLP into the space of the LLM's text embeddings.

    Its text side is frozen: embeddings from a store, less their centers.
    """

    center_rows: Tensor

    def __init__(self, backbone: Backbone, recipe: Recipe, dim: int) -> None:
        super().__init__(backbone, recipe, dim)
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

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D), as `Tower` says."""
        images = self._pixels(images)
        if not self.per_token:
            return self.projector(self.visual(images))
        tokens = self.visual.forward_features(images)[:, self.visual.num_prefix_tokens :]
        return self.projector(tokens).mean(dim=1)

    def match(self, facets: Sequence[tuple[str, str]]) -> None:
        """Take the centers of the columns from `centers`; zeros where nothing is subtracted."""
        super().match(facets)
        nothing = torch.zeros(self.dim)
        rows = [self.centers.get(kind, {}).get(name, nothing) for kind, name in facets]
        self.register_buffer("center_rows", torch.stack(rows), persistent=False)

    def forward(self, images: Tensor, texts: Tensor, columns: Tensor) -> Outputs:
        """Features of a batch, as `Tower` says; `texts` are facet embeddings (B, K, D)."""
        texts = texts.float() - self.center_rows[columns]
        return Outputs(self.encode_image(images), texts, self.log_scale.exp(), self.bias)


def create(settings: Training, dim: int | None = None) -> Tower:
    """A tower of a run's method, untrained.

    Args:
        settings: the run.
        dim: D where the settings do not say it: width of the text embeddings, for FLAME.
    """
    if isinstance(settings, FlameTraining):
        assert dim is not None
        return FlameTower(settings.backbone, settings.recipe, dim)
    import flame.towers.clip  # here, because open_clip takes seconds to import

    return flame.towers.clip.create(settings)


def save(tower: Tower, folder: Path, record: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `run.json`, all that `load` needs.

    Args:
        tower: the trained tower.
        folder: an existing folder.
        record: what is told about the run; has the settings (a `Training`) and `dim`.
    """
    tensors = {name: value.contiguous() for name, value in tower.state_dict().items()}
    for kind, facets in tower.centers.items():
        tensors |= {f"centers/{kind}/{facet}": vector for facet, vector in facets.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    seal(folder, ["model.safetensors", "run.json"])


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A tower in evaluation mode, trained here or by others, and the record of its run.

    Raises:
        ValueError: a file of it is broken.
    """
    record = read_json(verified(folder / "run.json"))
    settings = TypeAdapter[AnyTower](AnyTower).validate_python(record["settings"])
    if isinstance(settings, PretrainedTower):
        from flame.towers import pretrained  # here, because its libraries take seconds to import

        return pretrained.load(folder, settings), record
    tower = create(settings, record["dim"])
    tensors = load_file(verified(folder / "model.safetensors"))
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
