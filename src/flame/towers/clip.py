"""The CLIP baseline (Table 1): a text transformer is trained with the visual backbone.

The text tower is open_clip's transformer over byte-pair tokens.

Shapes: B images, K texts per image, T texts, L tokens, W width of the text transformer, D width of
the shared embedding space.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from open_clip.tokenizer import tokenize
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flame.study.schema.runs import Backbone, Recipe, TextTower
from flame.towers.base import Outputs, Tower


class ClipTower(Tower):
    """Visual backbone with a linear projection, and a text transformer.

    The recipe's settings of projector and centers do not apply.
    """

    trains_texts = True

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        text_tower: TextTower,
        context_length: int | None = None,
    ) -> None:
        """Create an untrained tower.

        Args:
            backbone: visual backbone.
            recipe: temperature and loss.
            text_tower: sizes of the text transformer, and D.
            context_length: L; that of `text_tower` by default.
        """
        super().__init__(backbone, recipe, text_tower.embed_dim)
        self.projection = nn.Linear(self.visual.head_hidden_size, self.dim, bias=False)
        self.context_length = context_length or text_tower.context_length
        self.text: Any = TextTransformer(
            context_length=self.context_length,
            width=text_tower.width,
            heads=text_tower.heads,
            layers=text_tower.layers,
            output_dim=self.dim,
        )

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass; see `Tower`."""
        super().checkpoint_activations()
        self.text.set_grad_checkpointing()

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D); see `Tower`."""
        return self.projection(self.visual(self._pixels(images)))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (T, L) int64: start token, text (truncated if too long), end token, zeros."""
        return tokenize(list(texts), self.context_length)

    def encode_text(self, texts: Sequence[str], language: str | None = None) -> Tensor:
        """Text features (T, D), not normalized, on the tower's device; `language` is ignored."""
        return self.encode_tokens(self.tokenize(texts).to(self.log_scale.device))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Text features (T, D), not normalized, of tokens (T, L) of any integer type."""
        text, tokens = self.text, tokens.long()
        # The end token has the highest number. Attention is causal, so the zeros behind the end
        # of the longest text can be left out.
        ends = tokens.argmax(dim=-1)
        length = int(ends.max()) + 1
        x = text.token_embedding(tokens[:, :length]) + text.positional_embedding[:length]
        # Checkpointing recomputes outside of this block, where the kernel would be another.
        with nullcontext() if text.transformer.grad_checkpointing else _attention(tokens.device):
            x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = x[torch.arange(len(x), device=x.device), ends]
        return text.ln_final(x) @ text.text_projection

    def example_texts(self, images: int, facets: int) -> Tensor:
        """Tokens (B, K, L) without zeros; see `Tower`."""
        tokens = torch.arange(1, self.context_length + 1, dtype=torch.int32)
        return tokens.expand(images, facets, -1).contiguous()

    def forward(self, images: Tensor, texts: Tensor, columns: Tensor) -> Outputs:
        """Features of a batch; see `Tower`. `texts` are tokens (B, K, L)."""
        features = [self.encode_tokens(tokens) for tokens in texts.unbind(dim=1)]
        return Outputs(
            self.encode_image(images),
            torch.stack(features, dim=1),
            self.log_scale.exp(),
            self.bias,
        )


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The fastest attention kernel: on a CPU, with texts this short, the plain one."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
