"""What makes a frozen LLM faster on one kind of machine than on another; its numbers stay the same.

None of it is a setting of a study: results differ only by rounding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import AttentionInterface

from flame.embedding.attention import facet_attention

OPAQUE = "facet_decoupled_opaque"  # the same attention, which torch.compile does not look into


@dataclass(frozen=True)
class LLMSpeed:
    """Speed settings of a frozen LLM.

    Args:
        fused_norms: replace the RMSNorm modules of `transformers`, about eight kernels in float32
            each, by the one kernel of torch.
        compile: compile the decoder layers except the last, by `torch.compile`. The first batch
            takes about a minute longer.
        attention: how the suffix tokens attend: as plain matrix products, which are faster on a
            CPU, or by `scaled_dot_product_attention`, which keeps no scores in memory.
        token_budget: default tokens of a batch, including padding.
        shards: shards of a store whose captions are batched together. Long captions in batches of
            16,384 tokens have 4 % of padding in one shard, and 1 % in four.
    """

    fused_norms: bool = False
    compile: bool = False
    attention: Literal["matmul", "sdpa"] = "matmul"
    token_budget: int = 1024
    shards: int = 1

    @classmethod
    def of(cls, device: torch.device) -> "LLMSpeed":
        """The fastest settings that we know for a kind of device."""
        if device.type == "cuda":
            return cls(fused_norms=True, attention="sdpa", token_budget=16_384, shards=4)
        return cls()


class FusedNorm(nn.Module):
    """Root mean square norm in one kernel; rounds once, where `transformers` rounds twice."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize the last axis: (..., D) -> (..., D)."""
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def fuse_norms(model: nn.Module) -> int:
    """Replace every RMSNorm of a model whose fused form computes the same; returns their number."""
    fused = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = _fused(child)
                if norm is not None:
                    setattr(parent, name, norm)
                    fused += 1
    return fused


def _fused(module: Any) -> FusedNorm | None:
    """The fused form of an RMSNorm, or None if there is none that computes the same."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or eps is None:
        return None
    shifted = (1 + weight.detach().float()).to(weight.dtype)  # Gemma stores the weight less one
    is_exact = torch.equal(shifted.float(), 1 + weight.detach().float())
    for factor in (weight.detach(), shifted) if is_exact else (weight.detach(),):
        norm = FusedNorm(factor, eps)
        if _agree(module, norm):
            return norm
    return None


@torch.inference_mode()
def _agree(module: nn.Module, norm: FusedNorm) -> bool:
    """Whether two norms differ only by rounding, on rows so large and so small that eps counts."""
    weight = norm.weight
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, len(weight), generator=generator)
    rows *= torch.tensor([[30.0], [1.0], [norm.eps**0.5], [0.1 * norm.eps**0.5]])
    rows = rows.to(weight)
    expected = module(rows).float()
    # Rounding the normalized row, and once more its product with the weight.
    tolerance = 2 * torch.finfo(weight.dtype).eps
    return torch.allclose(norm(rows).float(), expected, rtol=tolerance, atol=1e-30)


def compile_layers(model: Any) -> None:
    """Compile all decoder layers but the last, for any number and length of captions.

    A layer is compiled up to its attention, which runs as it is, and from there on. Layers of one
    type share their compiled code; a batch of one caption has code of its own.
    """
    if OPAQUE not in AttentionInterface():
        AttentionInterface.register(OPAQUE, torch.compiler.disable(facet_attention))
    model.set_attn_implementation(OPAQUE)
    for layer in model.layers[:-1]:
        layer.compile(dynamic=True)
