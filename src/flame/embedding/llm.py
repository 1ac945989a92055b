"""Frozen LLM: caption -> K facet embeddings in one pass (Section 3.3).

Shapes: N captions, B of them in a batch; P tokens of the batch's longest prefix, S tokens of the K
facet suffixes together, L = P + S; H heads, E values a head, D hidden size.

A batch is a rectangle: prefixes, padded on the right to P, then one block of all suffixes, the same
for every caption. The layers are the model's own; only their attention is replaced, through the
interface that `transformers` has for it.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModel, AutoTokenizer

from flame.runtime.checksums import verify
from flame.runtime.device import device_of, dtype_of

ATTENTION = "facet_decoupled"
LAYER_TYPES = ("full_attention", "sliding_attention")
TOKEN_BUDGET = 1024


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


class Layout:
    """Where the tokens of one batch are, and what each of them may attend to."""

    def __init__(
        self,
        prefix_lens: torch.Tensor,
        facet_lens: Sequence[int],
        *,
        positions: Literal["restart", "running"],
        dtype: torch.dtype,
    ):
        """Lay out a batch.

        Args:
            prefix_lens: (B,) tokens of each caption's prefix.
            facet_lens: tokens of each of the K suffixes.
            positions: whether each facet's positions restart after the prefix, or run on through
                all facets.
            dtype: of the attention's queries.
        """
        self.prefix_lens, self.facet_lens, self.dtype = prefix_lens, facet_lens, dtype
        self.prefix = int(prefix_lens.max())
        device = prefix_lens.device
        if positions == "restart":
            offsets = torch.cat([torch.arange(n) for n in facet_lens])
        else:
            offsets = torch.arange(sum(facet_lens))
        ahead = torch.arange(self.prefix, device=device).expand(len(prefix_lens), -1)
        self.positions = torch.cat([ahead, prefix_lens[:, None] + offsets.to(device)], dim=1)
        self.answers = torch.tensor(facet_lens, device=device).cumsum(0) - 1
        self._masks: dict[int | None, torch.Tensor] = {}

    @cached_property
    def _visible(self) -> torch.Tensor:
        """(B, S, L) bool: what the suffix tokens may attend to, windows aside."""
        mask = facet_mask(self.prefix, self.facet_lens)[self.prefix :].to(self.positions.device)
        columns = torch.arange(mask.shape[1], device=mask.device)
        real = (columns < self.prefix_lens[:, None]) | (columns >= self.prefix)
        return mask & real[:, None]

    def suffix_mask(self, window: int | None) -> torch.Tensor:
        """(B, 1, S, L) additive mask of the suffix tokens, in layers with this window (tokens)."""
        if window is not None and int(self.positions.max()) < window:
            window = None
        if window not in self._masks:
            visible = self._visible
            if window is not None:
                queries = self.positions[:, self.prefix :, None]
                visible = visible & (queries - self.positions[:, None] < window)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
            self._masks[window] = mask.masked_fill_(~visible, -torch.inf)[:, None]
        return self._masks[window]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of all tokens, (B, H, L, E) -> (B, L, H, E): prefix once, then suffixes."""
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
        suffixes = masked_attention(
            query[:, :, p:], key, value, self.suffix_mask(window), scaling=scaling
        )
        return torch.cat([prefix.transpose(1, 2), suffixes.transpose(1, 2)], dim=1)


class KeysAndValues(Exception):  # noqa: N818 - control flow, not an error
    """Ends a layer's forward where its keys and values are known; carries them out."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.key, self.value = key, value


class Capture:
    """In place of a `Layout`: attends to nothing, hands out keys and values."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> NoReturn:
        """End the layer here."""
        raise KeysAndValues(key, value)


class Answers:
    """In place of a `Layout`: the K answer positions as queries, all tokens as keys."""

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
    """The last layer, computed only where its output is used: (B, L, D) -> (B, K, D)."""

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
        """Take keys and values of all tokens, then run the layer on the answers alone."""
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
    """Attention of every layer, as `transformers` calls it; `facets` is the model's own keyword."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} needs {name!r}, which is not supported here")
    return facets.attend(query, key, value, scaling=scaling, window=sliding_window), None


AttentionInterface.register(ATTENTION, facet_attention)


class FrozenLLM:
    """A frozen LLM that embeds captions, all facets of a caption in one pass."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        layer: int | Literal["last"] = "last",
        final_norm: bool = True,
        positions: Literal["restart", "running"] = "restart",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str = "auto",
    ):
        """Load a checkpoint.

        Args:
            checkpoint: folder with a `transformers` model and its tokenizer.
            layer: the decoder layer, counted from 1, whose output is used; the paper's is the last.
            final_norm: whether the model's final norm is applied to that output.
            positions: `restart` after the prefix for every facet (one pass equals K passes), or
                `running` on from facet to facet as in the release.
            dtype: of weights and activations; `auto` is bfloat16 where the hardware computes in it.
            device: a torch device; `auto` is the GPU if there is one.

        Raises:
            ValueError: the checkpoint is broken, or of an architecture that is not known here.
        """
        verify(checkpoint)
        self.device = device_of(device)
        self.dtype = dtype_of(dtype, self.device)
        self.positions = positions
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModel.from_pretrained(
            checkpoint, dtype=self.dtype, attn_implementation=ATTENTION
        )
        self.model = getattr(model, "language_model", model).to(self.device).eval()
        _check_architecture(self.model)
        self._cut(layer, final_norm)

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.model.config.hidden_size

    def truncate(self, captions: Sequence[str], max_tokens: int) -> tuple[list[str], int]:
        """Captions cut after `max_tokens` tokens, and how many of them were cut."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
        if not captions:  # as in a part of a small set; tokenizers fail on no text
            return [], 0
        cut = list(captions)
        for i, spans in enumerate(
            self._tokenize(captions, return_offsets_mapping=True)["offset_mapping"]
        ):
            if len(spans) > max_tokens:
                cut[i] = captions[i][: spans[max_tokens - 1][1]]
        return cut, sum(len(a) < len(b) for a, b in zip(cut, captions, strict=True))

    @torch.inference_mode()
    def embed(
        self,
        captions: Sequence[str],
        prefix: tuple[str, str],
        suffixes: Sequence[str],
        *,
        token_budget: int = TOKEN_BUDGET,
        on_batch: Callable[[int], object] = lambda _: None,
    ) -> torch.Tensor:
        """Embed captions: the hidden state at the last token of each facet.

        Args:
            captions: N texts, taken verbatim.
            prefix: what stands before and after the caption in the prefix that all facets share.
            suffixes: the K facet endings.
            token_budget: tokens of a batch, padding included; changes speed, and numbers only by
                rounding.
            on_batch: called after each batch with its number of captions.

        Returns:
            (N, K, D) float32 on the CPU, in the order of `captions`.
        """
        prefixes = self.prefixes(captions, prefix)
        endings = self.endings(prefix[1], suffixes)
        tail = torch.tensor([*chain(*endings)])
        out = torch.empty(len(prefixes), len(endings), self.dim)
        for rows in plan([len(ids) for ids in prefixes], len(tail), token_budget):
            batch = [torch.tensor(prefixes[row]) for row in rows]
            layout = Layout(
                torch.tensor([len(ids) for ids in batch], device=self.device),
                [len(ids) for ids in endings],
                positions=self.positions,
                dtype=self.dtype,
            )
            # What the padding holds is never attended to.
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            ids = torch.cat([padded, tail.expand(len(rows), -1)], dim=1)
            states = self.model(
                ids.to(self.device), position_ids=layout.positions, facets=layout, use_cache=False
            )
            out[rows] = states.last_hidden_state.float().cpu()
            on_batch(len(rows))
        return out

    def _cut(self, layer: int | Literal["last"], final_norm: bool) -> None:
        """Keep the layers up to `layer`, the last of them reduced to the answer positions."""
        layers = self.model.layers
        depth = len(layers) if layer == "last" else layer
        if not 1 <= depth <= len(layers):
            raise ValueError(f"layer {layer} of an LLM with layers 1 to {len(layers)}")
        self.model.layers = nn.ModuleList([*layers[: depth - 1], AnswerLayer(layers[depth - 1])])
        if not final_norm:
            self.model.norm = nn.Identity()

    def _tokenize(self, texts: Sequence[str], **kwargs: Any) -> Any:
        # A special token's name inside a text is text.
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, **kwargs
        )

    def prefixes(self, captions: Sequence[str], prefix: tuple[str, str]) -> list[list[int]]:
        """Tokens of every caption's prefix, after the BOS token if this tokenizer wants one."""
        if not captions:
            return []
        before, after = prefix
        bos = [i for i in self.tokenizer("").input_ids if i == self.tokenizer.bos_token_id]
        texts = [before + caption + after for caption in captions]
        prefixes = [bos + ids for ids in self._tokenize(texts).input_ids]
        longest, limit = max(map(len, prefixes)), self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a caption's prefix has {longest} tokens, this LLM takes {limit}: "
                "set max_caption_tokens"
            )
        return prefixes

    def endings(self, after: str, suffixes: Sequence[str]) -> list[list[int]]:
        """Tokens of every suffix as they come out when it follows the prefix.

        Tokenising a suffix alone would differ in SentencePiece tokenizers, which put a space before
        every text.
        """
        head, *joint = self._tokenize([after, *(after + suffix for suffix in suffixes)]).input_ids
        for suffix, ids in zip(suffixes, joint, strict=True):
            if ids[: len(head)] != head or len(ids) == len(head):
                raise ValueError(
                    f"suffix {suffix!r} does not start a new token after the prefix's end {after!r}"
                )
        return [ids[len(head) :] for ids in joint]


def cleaned(text: str) -> str:
    """A caption as the official release gives it to its LLM; an empty one stays empty.

    It gets a full stop unless it ends in `.`, `?` or a quotation mark; double quotation marks
    become single ones, as the prompt has double ones around it; a last `?` becomes a full stop.
    """
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def plan(prefix_lens: Sequence[int], suffix_len: int, token_budget: int) -> list[list[int]]:
    """Batches of captions of like length, longest first.

    Args:
        prefix_lens: (N,) tokens of each caption's prefix.
        suffix_len: S, tokens of all suffixes together.
        token_budget: most tokens of a batch, padding included; a longer caption is a batch alone.

    Returns:
        Rows of `prefix_lens`, each once.
    """
    order = sorted(range(len(prefix_lens)), key=lambda row: -prefix_lens[row])
    batches = []
    while order:
        size = max(1, token_budget // (prefix_lens[order[0]] + suffix_len))
        batches.append(order[:size])
        order = order[size:]
    return batches


def _check_architecture(model: nn.Module) -> None:
    """Refuse models in which facets could see each other by another way than attention."""
    others = set(getattr(model.config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if others or not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} cannot be used: its layers must be of {LAYER_TYPES}"
            f" and call transformers' attention interface; found {sorted(others)}"
        )
