"""Frozen LLM: caption -> K facet embeddings in one pass (Section 3.3).

Shapes: N captions, K facets, D hidden size of the LLM.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from flame.embedding.attention import ATTENTION, AnswerLayer, Layout
from flame.runtime.checksums import verify
from flame.runtime.device import device_of, dtype_of
from flame.study.schema.llms import LLMOptions

LAYER_TYPES = ("full_attention", "sliding_attention")
TOKEN_BUDGET = 1024
AS_PUBLISHED = LLMOptions(
    layer="last", final_norm=True, positions="restart", max_caption_tokens=None, cleanup="none"
)


class FrozenLLM:
    """A frozen LLM that embeds captions, all facets of a caption in one pass."""

    def __init__(
        self,
        checkpoint: Path,
        options: LLMOptions = AS_PUBLISHED,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str = "auto",
    ):
        """Load a checkpoint.

        Args:
            checkpoint: folder with a `transformers` model and its tokenizer.
            options: how the LLM reads captions; the paper's way by default.
            dtype: of weights and activations; `auto` is bfloat16 where the hardware supports it.
            device: a torch device; `auto` is the GPU if there is one.

        Raises:
            ValueError: the checkpoint is corrupt, its architecture is not supported, or it has no
                such layer.
        """
        verify(checkpoint)
        self.options = options
        self.device = device_of(device)
        self.dtype = dtype_of(dtype, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModel.from_pretrained(
            checkpoint, dtype=self.dtype, attn_implementation=ATTENTION
        )
        self.model = getattr(model, "language_model", model).to(self.device).eval()
        _check_architecture(self.model)
        self._cut(options.layer, options.final_norm)

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.model.config.hidden_size

    def prepare(self, captions: Sequence[str]) -> tuple[list[str], int]:
        """Captions as the options want them read, and how many of them were truncated."""
        texts = list(captions)
        if self.options.cleanup == "release":
            texts = [*map(cleaned, texts)]
        if self.options.max_caption_tokens is None:
            return texts, 0
        return self.truncate(texts, self.options.max_caption_tokens)

    def truncate(self, captions: Sequence[str], max_tokens: int) -> tuple[list[str], int]:
        """Captions truncated to `max_tokens` tokens, and how many of them were."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
        if not captions:  # a part of a small set may be empty, and tokenizers fail on no text
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
            captions: N texts, used verbatim.
            prefix: text before and after the caption in the prefix that all facets share.
            suffixes: the K facet suffixes.
            token_budget: tokens of a batch, including padding; affects speed, and results only by
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
                positions=self.options.positions,
                dtype=self.dtype,
            )
            # The padding is never attended to.
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            ids = torch.cat([padded, tail.expand(len(rows), -1)], dim=1)
            states = self.model(
                ids.to(self.device), position_ids=layout.positions, facets=layout, use_cache=False
            )
            out[rows] = states.last_hidden_state.float().cpu()
            on_batch(len(rows))
        return out

    def _cut(self, layer: int | Literal["last"], final_norm: bool) -> None:
        """Keep the layers up to `layer`, and compute the last one at the answer positions only."""
        layers = self.model.layers
        depth = len(layers) if layer == "last" else layer
        if not 1 <= depth <= len(layers):
            raise ValueError(f"layer {layer} of an LLM with layers 1 to {len(layers)}")
        self.model.layers = nn.ModuleList([*layers[: depth - 1], AnswerLayer(layers[depth - 1])])
        if not final_norm:
            self.model.norm = nn.Identity()

    def _tokenize(self, texts: Sequence[str], **kwargs: Any) -> Any:
        # The name of a special token inside a caption is plain text.
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, **kwargs
        )

    def prefixes(self, captions: Sequence[str], prefix: tuple[str, str]) -> list[list[int]]:
        """Tokens of every caption's prefix, with a BOS token if the tokenizer adds one."""
        if not captions:
            return []
        before, after = prefix
        bos = [i for i in self.tokenizer("").input_ids if i == self.tokenizer.bos_token_id]
        texts = [before + caption + after for caption in captions]
        prefixes = [bos + ids for ids in self._tokenize(texts).input_ids]
        longest, limit = max(map(len, prefixes)), self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a caption's prefix has {longest} tokens, the LLM's limit is {limit}: "
                "set max_caption_tokens"
            )
        return prefixes

    def endings(self, after: str, suffixes: Sequence[str]) -> list[list[int]]:
        """Tokens of every suffix, tokenized after the end of the prefix.

        SentencePiece tokenizers put a space before every text, so a suffix tokenized alone differs.
        """
        head, *joint = self._tokenize([after, *(after + suffix for suffix in suffixes)]).input_ids
        for suffix, ids in zip(suffixes, joint, strict=True):
            if ids[: len(head)] != head or len(ids) == len(head):
                raise ValueError(
                    f"suffix {suffix!r} does not start a new token after the prefix's end {after!r}"
                )
        return [ids[len(head) :] for ids in joint]


def cleaned(text: str) -> str:
    """A caption as the official release passes it to its LLM; an empty one stays empty.

    A full stop is appended unless the caption ends in `.`, `?` or a quotation mark. Double
    quotation marks become single ones, because the prompt quotes the caption in double ones. A
    final `?` becomes a full stop.
    """
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def plan(prefix_lens: Sequence[int], suffix_len: int, token_budget: int) -> list[list[int]]:
    """Batches of captions of similar length, longest first.

    Args:
        prefix_lens: (N,) tokens of each caption's prefix.
        suffix_len: S, tokens of all suffixes together.
        token_budget: limit of tokens of a batch, including padding; a longer caption is a batch of
            its own.

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
    """Refuse models in which facets could see each other other than by attention."""
    others = set(getattr(model.config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if others or not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} is not supported: its layers must be of types {LAYER_TYPES}"
            f" and call the attention interface of transformers; found {sorted(others)}"
        )
