"""The Long-CLIP baseline (Table 1): a trained CLIP, fine-tuned on long captions.

Its positional embedding is stretched and its first rows are frozen (Long-CLIP, ECCV 2024, and its
release). Its two losses are in `flame.training.loss`.

Shapes: L tokens, W width of the text transformer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flame.study.settings import LongClipTraining
from flame.towers.clip import ClipTower


class LongClipTower(ClipTower):
    """A CLIP whose positional embedding is stretched and partly frozen."""

    def __init__(self, settings: LongClipTraining) -> None:
        """Create an untrained tower; `start_from` loads the weights of a CLIP."""
        super().__init__(
            settings.backbone, settings.recipe, settings.text_tower, settings.context_length
        )
        self.settings = settings
        parametrize.register_parametrization(
            self.text, "positional_embedding", _Kept(settings.kept_positions)
        )
        # original0 holds the frozen rows. Without a gradient they do not decay either.
        self.text.parametrizations.positional_embedding.original0.requires_grad_(False)

    def start_from(self, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Load the weights of a trained CLIP; the temperature is reset to the recipe's.

        Args:
            weights: state dict of the CLIP.
            settings: of the CLIP run, as `run.json` holds them.

        Raises:
            ValueError: the run used another method, backbone or text tower.
        """
        own = self.settings.model_dump(mode="json") | {"method": "clip"}
        for name in ("method", "backbone", "text_tower"):
            if settings.get(name) != own[name]:
                raise ValueError(f"{name} {settings.get(name)!r}, not {own[name]!r}")
        loaded = dict(weights)
        kept = self.settings.kept_positions
        rows = stretched(loaded.pop("text.positional_embedding"), self.context_length, kept)
        name = "text.parametrizations.positional_embedding.original"
        loaded |= {f"{name}0": rows[:kept], f"{name}1": rows[kept:]}
        self.load_state_dict(loaded | {"log_scale": self.log_scale, "bias": self.bias})


def stretched(positions: Tensor, length: int, kept: int) -> Tensor:
    """A positional embedding for longer texts, linearly interpolated behind the first rows.

    Row j >= kept is read at kept + (j - kept) / r, r = (length - kept) / (L - kept): between two
    old rows, or behind the last one, on the line through the last two. So 77 rows become the 248
    of Long-CLIP with kept = 20 and r = 4.

    Args:
        positions: (L, W).
        length: number of rows of the result.
        kept: number of first rows that stay as they are.

    Returns:
        (length, W).

    Raises:
        ValueError: there is nothing to interpolate.
    """
    old = len(positions)
    if not kept + 2 <= old <= length:
        raise ValueError(f"{old} positions, {kept} of them kept, cannot be stretched to {length}")
    behind = torch.arange(length - kept, dtype=torch.float64)
    places = kept + behind * (old - kept) / (length - kept)
    lower = places.long().clamp(max=old - 2)
    share = (places - lower)[:, None].to(positions.dtype)
    rows = positions[lower] + share * (positions[lower + 1] - positions[lower])
    return torch.cat([positions[:kept], rows])


class _Kept(nn.Module):
    """A matrix (L, W) whose first rows are a parameter of their own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, kept: Tensor, others: Tensor) -> Tensor:
        return torch.cat([kept, others])

    def right_inverse(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix[: self.rows].clone(), matrix[self.rows :].clone()
