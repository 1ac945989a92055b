"""The command line of clip_benchmark with an additional model type, `flame`.

    python -m flame.clip_benchmark eval --model_type flame --pretrained results/export/flame-7
        --model class --no_amp ...

`--pretrained` is an export or a model on the hub, `--model` the kind of the texts, which selects
the prompt: `class`, `short` or `long`. All other options are clip_benchmark's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from clip_benchmark import cli, models
from clip_benchmark.metrics import zeroshot_classification
from torch import Tensor, nn

from flame.evaluation.encoder import Flame, load
from flame.runtime.errors import known


class Words(list[str]):
    """Texts in place of tokens: the LLM's tokenizer needs them together with the prompt."""

    def to(self, device: Any) -> "Words":
        """The same texts, for any device."""
        return self


class Adapter(nn.Module):
    """A model with the methods that clip_benchmark calls."""

    def __init__(self, flame: Flame, kind: str) -> None:
        super().__init__()
        self._flame, self._kind = flame, kind

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D)."""
        return self._flame.encode_image(images)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text features (T, D)."""
        return self._flame.encode_text(texts, self._kind)


def load_flame(
    model_name: str, pretrained: str, cache_dir: str | None, device: str | torch.device
) -> tuple[Adapter, Any, Any]:
    """Model, transform and tokenizer, as clip_benchmark expects them."""
    flame = load(pretrained, device=str(device))
    if model_name not in flame.settings.kinds:
        raise ValueError(f"unknown --model {known(model_name, flame.settings.kinds)}")
    return Adapter(flame, model_name), flame.preprocess, Words


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Share of images (N, C) whose class (N,) is among the top k, for each k.

    Replaces the function of clip_benchmark 1.6.2, which converts an array of one element to float:
    NumPy 2.4 refuses that.
    """
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [hits[:, :k].any(dim=1).float().mean().item() for k in topk]


def main() -> None:
    """Run clip_benchmark's command line."""
    zeroshot_classification.accuracy = accuracy
    models.TYPE2FUNC["flame"] = load_flame
    if "flame" not in models.MODEL_TYPES:
        models.MODEL_TYPES.append("flame")
    cli.main()


if __name__ == "__main__":
    main()
