"""Facet-decoupled attention: K facets of a caption in one pass (Section 3.3, Figure 3).

The layers are the model's own. Only their attention is replaced, through the attention interface of
`transformers`.

Shapes: B captions of a batch; P tokens of the batch's longest prefix, S tokens of the K facet
suffixes together, L = P + S; H heads, E values per head, D hidden size. A batch is a rectangle:
prefixes, padded on the right to P, then one block of all suffixes, the same for every caption.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "facet_decoupled"


def facet_mask(prefix_len: int, facet_lens: Sequence[int]) -> torch.Tensor:
    """Causal mask in which a facet sees the prefix and itself, but no other facet (Section 3.3).

    Args:
        prefix_len: P, tokens of the prefix that all facets share.
        facet_lens: tokens of each of the K facet suffixes, in order.

    Returns:
        (L, L) bool with L = P + sum(facet_lens); True where the row's token may attend to the
        column's.
    """
    length = prefix_len + sum(facet_lens)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    start = prefix_len
    for facet_len in facet_lens:
        mask[start : start + facet_len, prefix_len:start] = False
        start += facet_len
    return mask


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """Attention of few queries under an additive mask, as plain matrix products.

    In bfloat16 on a CPU this takes half the time of `scaled_dot_product_attention`.

    Args:
        query: (B, H, Q, E).
        key: (B, G, L, E); G key heads, each shared by H / G query heads.
        value: (B, G, L, E).
        mask: (B, 1, Q, L), 0 or -inf.
        scaling: factor of the scores.

    Returns:
        (B, H, Q, E).
    """
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])
    scores = rows @ key.transpose(2, 3)
    weights = torch.add(mask, scores.view(*query.shape[:3], -1), alpha=scaling).softmax(dim=-1)
    return (weights.view(scores.shape) @ value).view(query.shape)


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """The same as `masked_attention` by a kernel that keeps no scores in memory.

    The query heads that share a key head become rows of one head: the kernels of torch that take a
    mask want as many key heads as query heads.

    Args:
        query: (B, H, Q, E).
        key: (B, G, L, E).
        value: (B, G, L, E).
        mask: (B, 1, H / G * Q, L), 0 or -inf: that of `masked_attention`, H / G times.
        scaling: factor of the scores.

    Returns:
        (B, H, Q, E).
    """
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])
    found = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(query.shape)  # not all kernels return heads before tokens in memory


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; a GPU copies it while the CPU goes on."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Layout:
    """Positions of the tokens of a batch, and what each token may attend to."""

    def __init__(
        self,
        prefix_lens: torch.Tensor,
        facet_lens: Sequence[int],
        *,
        positions: Literal["restart", "running"],
        dtype: torch.dtype,
        device: torch.device | None = None,
        attention: Literal["matmul", "sdpa"] = "matmul",
    ):
        """Lay out a batch.

        Args:
            prefix_lens: (B,) tokens of each caption's prefix, on the CPU.
            facet_lens: tokens of each of the K suffixes.
            positions: whether position ids restart after the prefix for each facet, or run on
                through all facets.
            dtype: of the attention's queries.
            device: of the attention; the CPU by default.
            attention: how the suffix tokens attend, see `flame.embedding.speed`.
        """
        device = device or prefix_lens.device
        self.facet_lens, self.dtype, self.attention = facet_lens, dtype, attention
        self.prefix = int(prefix_lens.max())
        if positions == "restart":
            offsets = torch.cat([torch.arange(n) for n in facet_lens])
        else:
            offsets = torch.arange(sum(facet_lens))
        ahead = torch.arange(self.prefix).expand(len(prefix_lens), -1)
        all_positions = torch.cat([ahead, prefix_lens[:, None] + offsets], dim=1)
        self._last_position = int(all_positions.max())
        self.positions = moved(all_positions, device)
        self.prefix_lens = moved(prefix_lens, device)
        self.answers = moved(torch.tensor(facet_lens).cumsum(0) - 1, device)
        self._masks: dict[tuple[int | None, int], torch.Tensor] = {}

    @cached_property
    def _visible(self) -> torch.Tensor:
        """(B, S, L) bool: what the suffix tokens may attend to, ignoring sliding windows."""
        mask = facet_mask(self.prefix, self.facet_lens)[self.prefix :]
        mask = moved(mask, self.positions.device)
        columns = torch.arange(mask.shape[1], device=mask.device)
        real = (columns < self.prefix_lens[:, None]) | (columns >= self.prefix)
        return mask & real[:, None]

    def suffix_mask(self, window: int | None, repeats: int = 1) -> torch.Tensor:
        """Additive mask of the suffix tokens, (B, 1, repeats * S, L).

        Args:
            window: tokens that a token sees in this layer; None: all before it.
            repeats: how often the mask is repeated, for heads that became rows.
        """
        if window is not None and self._last_position < window:
            window = None
        if (window, repeats) not in self._masks:
            visible = self._visible
            if window is not None:
                queries = self.positions[:, self.prefix :, None]
                visible = visible & (queries - self.positions[:, None] < window)
            visible = visible.repeat(1, repeats, 1)
            *rows, columns = visible.shape
            # Kernels copy a mask whose rows do not start at multiples of 16 elements.
            width = columns if repeats == 1 else -(-columns // 16) * 16
            mask = torch.zeros(*rows, width, dtype=self.dtype, device=visible.device)[..., :columns]
            self._masks[window, repeats] = mask.masked_fill_(~visible, -torch.inf)[:, None]
        return self._masks[window, repeats]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of all tokens, (B, H, L, E) -> (B, L, H, E): prefix first, then suffixes."""
        p = self.prefix
        near = None
        if window is not None and window < p:
            near = torch.ones(p, p, dtype=torch.bool, device=key.device).tril().triu(1 - window)
        prefix = scaled_dot_product_attention(
            query[:, :, :p],
            key[:, :, :p],
            value[:, :, :p],
            attn_mask=near,
            is_causal=near is None,
            scale=scaling,
            enable_gqa=True,
        )
        attend, repeats = masked_attention, 1
        if self.attention == "sdpa":
            attend, repeats = grouped_attention, query.shape[1] // key.shape[1]
        mask = self.suffix_mask(window, repeats)
        suffixes = attend(query[:, :, p:], key, value, mask, scaling=scaling)
        return torch.cat([prefix.transpose(1, 2), suffixes.transpose(1, 2)], dim=1)


class KeysAndValues(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside a layer's forward pass, to return its keys and values and skip the rest."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.key, self.value = key, value


class Capture:
    """Stand-in for a `Layout` that captures keys and values instead of attending."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> NoReturn:
        """Stop the layer here."""
        raise KeysAndValues(key, value)


class Answers:
    """Stand-in for a `Layout` with the K answer positions as queries and all tokens as keys."""

    def __init__(self, layout: Layout, captured: KeysAndValues):
        self.layout, self.key, self.value = layout, captured.key, captured.value

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of the answer positions, (B, H, K, E) -> (B, K, H, E)."""
        mask = self.layout.suffix_mask(window)[:, :, self.layout.answers]
        return masked_attention(query, self.key, self.value, mask, scaling=scaling).transpose(1, 2)


class AnswerLayer(nn.Module):
    """The last layer, computed only at the answer positions: (B, L, D) -> (B, K, D)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        facets: Layout,
        position_embeddings: tuple[torch.Tensor, ...],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute keys and values of all tokens, then run the layer on the answers only."""
        rows = facets.prefix + facets.answers
        try:
            self.layer(
                hidden_states, facets=Capture(), position_embeddings=position_embeddings, **kwargs
            )
        except KeysAndValues as captured:
            answers = Answers(facets, captured)
        kwargs["position_ids"] = facets.positions[:, rows]
        return self.layer(
            hidden_states[:, rows],
            facets=answers,
            position_embeddings=tuple(part[:, rows] for part in position_embeddings),
            **kwargs,
        )


def facet_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    facets: Layout | Capture | Answers,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every layer, as called by `transformers`, which passes `facets` through."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} needs {name!r}, which is not supported")
    return facets.attend(query, key, value, scaling=scaling, window=sliding_window), None


AttentionInterface.register(ATTENTION, facet_attention)
