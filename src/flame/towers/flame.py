"""The tower of FLAME: a visual backbone and a projector into the LLM's space (Section 3.1).

Shapes: B images, K facets, D width of the text embeddings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flame.study.schema.runs import Backbone, Recipe
from flame.towers.base import Outputs, Tower


class FlameTower(Tower):
    """Visual backbone and two-layer MLP into the space of the LLM's text embeddings.

    The text side is frozen: embeddings from a store, minus their centers.
    """

    center_rows: Tensor

    def __init__(self, backbone: Backbone, recipe: Recipe, dim: int) -> None:
        super().__init__(backbone, recipe, dim)
        self.per_token = recipe.projector == "per_token"
        if self.per_token and not hasattr(self.visual, "num_prefix_tokens"):
            raise ValueError(
                f"projector 'per_token' needs a token-based backbone such as a ViT, "
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
        """Image features (B, D); see `Tower`."""
        images = self._pixels(images)
        if not self.per_token:
            return self.projector(self.visual(images))
        tokens = self.visual.forward_features(images)[:, self.visual.num_prefix_tokens :]
        return self.projector(tokens).mean(dim=1)

    def match(self, facets: Sequence[tuple[str, str]]) -> None:
        """Look up the center of each facet in `centers`; zero where there is none."""
        nothing = torch.zeros(self.dim)
        rows = [self.centers.get(kind, {}).get(name, nothing) for kind, name in facets]
        self.register_buffer("center_rows", torch.stack(rows), persistent=False)

    def compile_visual(self, backend: str) -> None:
        """Compile the backbone; see `Tower`."""
        if self.per_token:  # calls only this part of it
            self.visual.forward_features = torch.compile(
                self.visual.forward_features, backend=backend
            )
        else:
            super().compile_visual(backend)

    def example_texts(self, images: int, facets: int) -> Tensor:
        """Facet embeddings (B, K, D); see `Tower`."""
        return torch.ones(images, facets, self.dim, dtype=torch.float16)

    def forward(self, images: Tensor, texts: Tensor, columns: Tensor) -> Outputs:
        """Features of a batch; see `Tower`. `texts` are facet embeddings (B, K, D)."""
        texts = texts.float() - self.center_rows[columns]
        return Outputs(self.encode_image(images), texts, self.log_scale.exp(), self.bias)
