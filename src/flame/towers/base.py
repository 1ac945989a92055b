"""What the towers of all methods share: visual backbone, temperature, bias.

Shapes: B images, K texts per image, H and W pixels, D width of the shared embedding space.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from flame.study.schema.runs import Backbone, Recipe

# Mean text embeddings of the training store: caption kind -> facet -> (D,).
Centers = dict[str, dict[str, Tensor]]

# Initial bias of the release's sigmoid loss: nearly all pairs of a batch are negative.
INITIAL_BIAS = -10.0


class Outputs(NamedTuple):
    """Outputs of a forward pass, the inputs of a loss."""

    images: Tensor  # (B, D)
    texts: Tensor  # (B, K, D)
    scale: Tensor  # () 1/tau
    bias: Tensor  # ()


class Tower(nn.Module):
    """Base class of all trained towers. Subclasses define `encode_image` and `forward`.

    Attributes:
        dim: D.
        image_size: height and width of the input, in pixels.
        resize: how images are made square; a key of `flame.data.pixels.RESIZES`.
        centers: what training subtracted from the text embeddings; empty if nothing.
        trains_texts: whether the texts of `forward` have a gradient.
    """

    mean: Tensor
    std: Tensor
    resize = "fit"
    trains_texts = False

    def __init__(self, backbone: Backbone, recipe: Recipe, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.image_size = backbone.image_size
        self.visual: Any = _create_visual(backbone)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(recipe.tau)))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS), requires_grad=recipe.loss == "sigmoid")
        self.max_log_scale = math.log(recipe.max_scale)
        self.centers: Centers = {}
        pixels = resolve_model_data_config(self.visual)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(pixels[name]).view(3, 1, 1))
        # Convolutions are faster in this layout, on CPUs and on GPUs.
        self.visual.to(memory_format=torch.channels_last)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D), not normalized: all losses and all tasks use cosines.

        Args:
            images: (B, 3, H, W) pixels in [0, 1]; the backbone's mean and std are applied here.
        """
        raise NotImplementedError

    def forward(self, images: Tensor, texts: Tensor, columns: Tensor) -> Outputs:
        """Features of a batch; the part of a training step that may run in bfloat16.

        Args:
            images: (B, 3, H, W) pixels in [0, 1].
            texts: (B, K, ...) facet embeddings or tokens, depending on the method.
            columns: (K,) int64, indices of the K facets among all target facets.
        """
        raise NotImplementedError

    def match(self, facets: Sequence[tuple[str, str]]) -> None:
        """Prepare for batches with these facets; call this before training.

        Args:
            facets: (caption kind, facet) of each target facet.
        """

    def example_texts(self, images: int, facets: int) -> Tensor:
        """Texts (B, K, ...) as large as `forward` may get them.

        Args:
            images: B.
            facets: K.
        """
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            ValueError: the backbone cannot.
        """
        try:
            self.visual.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:  # timm's answers
            name = type(self.visual).__name__
            raise ValueError(f"{name} of timm has no gradient checkpointing") from error

    def compile_visual(self, backend: str) -> None:
        """Compile the backbone; names of parameters stay as they are.

        Args:
            backend: of torch.compile.
        """
        self.visual.compile(backend=backend)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep 1/tau within [1, max_scale]; call this after every step."""
        self.log_scale.clamp_(0.0, self.max_log_scale)

    def _pixels(self, images: Tensor) -> Tensor:
        """Images as the backbone expects them."""
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.std


def _create_visual(backbone: Backbone) -> Any:
    args = dict(backbone.args)
    # Models whose weights depend on the image size (position embeddings) need to know it.
    pretrained = timm.get_pretrained_cfg(backbone.timm)
    if pretrained and pretrained.fixed_input_size:
        args.setdefault("img_size", backbone.image_size)
    try:
        return timm.create_model(backbone.timm, num_classes=0, in_chans=3, **args)
    except TypeError as error:
        raise ValueError(f"backbone {backbone.timm!r}, args {backbone.args}: {error}") from error
