"""Frozen LLM: caption -> K facet embeddings in one pass (Section 3.3).

Shapes: N captions, K facets, D hidden size of the LLM.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PretrainedConfig

from flame.embedding.attention import ATTENTION, AnswerLayer, Layout, moved
from flame.embedding.speed import LLMSpeed, compile_layers, fuse_norms
from flame.runtime.checksums import verify
from flame.runtime.device import device_of, dtype_of
from flame.study.schema.llms import LLMOptions

LAYER_TYPES = ("full_attention", "sliding_attention")
TOKENIZED = 1024  # captions at a time, as each token takes 130 bytes with its place in the text
TOKEN_BUDGET = LLMSpeed.token_budget
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
        speed: LLMSpeed | None = None,
    ):
        """Load a checkpoint.

        A GPU gets its weights tensor by tensor from the files: the memory of the host never holds
        them all.

        Args:
            checkpoint: folder with a `transformers` model and its tokenizer.
            options: how the LLM reads captions; the paper's way by default.
            dtype: of weights and activations; `auto` is bfloat16 where the hardware supports it.
            device: a torch device; `auto` is the GPU if there is one.
            speed: speed settings; those of the device by default.

        Raises:
            ValueError: the checkpoint is corrupt, its architecture is not supported, or it has no
                such layer.
        """
        verify(checkpoint)
        place = device_of(device)
        model = AutoModel.from_pretrained(
            checkpoint,
            dtype=dtype_of(dtype, place),
            attn_implementation=ATTENTION,
            device_map={"": place} if place.type != "cpu" else None,
        )
        self._take(model, AutoTokenizer.from_pretrained(checkpoint), options, speed)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        options: LLMOptions = AS_PUBLISHED,
        *,
        speed: LLMSpeed | None = None,
    ) -> "FrozenLLM":
        """Take a model that is loaded already, and change it.

        Args:
            model: base model of `transformers`, in the dtype and on the device to compute with.
            tokenizer: its tokenizer; without one there is only `embed_tokens`.
            options: how the LLM reads captions.
            speed: speed settings; those of the device by default.

        Raises:
            ValueError: the architecture is not supported, or it has no such layer.
        """
        model.set_attn_implementation(ATTENTION)
        encoder = cls.__new__(cls)
        encoder._take(model, tokenizer, options, speed)
        return encoder

    @classmethod
    def random(
        cls,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "auto",
        speed: LLMSpeed | None = None,
    ) -> "FrozenLLM":
        """An LLM of a given shape with random weights and no tokenizer, to measure its speed."""
        with torch.device(device_of(device)):
            model = AutoModel.from_config(config, dtype=dtype)
        return cls.from_model(model, speed=speed)

    def _take(
        self, model: Any, tokenizer: Any, options: LLMOptions, speed: LLMSpeed | None
    ) -> None:
        self.model = getattr(model, "language_model", model).eval()
        self.tokenizer, self.options = tokenizer, options
        self.device, self.dtype = self.model.device, self.model.dtype
        self.speed = speed or LLMSpeed.of(self.device)
        _check_architecture(self.model)
        self._cut(options.layer, options.final_norm)
        if self.speed.fused_norms:
            fuse_norms(self.model)
        if self.speed.compile:
            compile_layers(self.model)

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
        cut = list(captions)
        for start in range(0, len(cut), TOKENIZED):
            some = cut[start : start + TOKENIZED]
            found = self._tokenize(some, return_offsets_mapping=True)["offset_mapping"]
            for i, spans in enumerate(found, start):
                if len(spans) > max_tokens:
                    cut[i] = captions[i][: spans[max_tokens - 1][1]]
        return cut, sum(len(a) < len(b) for a, b in zip(cut, captions, strict=True))

    def embed(
        self,
        captions: Sequence[str],
        prefix: tuple[str, str],
        suffixes: Sequence[str],
        *,
        token_budget: int | None = None,
        on_batch: Callable[[int], object] = lambda _: None,
    ) -> torch.Tensor:
        """Embed captions: the hidden state at the last token of each facet.

        Args:
            captions: N texts, used verbatim.
            prefix: text before and after the caption in the prefix that all facets share.
            suffixes: the K facet suffixes.
            token_budget: as in `embed_tokens`.
            on_batch: as in `embed_tokens`.

        Returns:
            (N, K, D) float32 on the CPU, in the order of `captions`.
        """
        return self.embed_tokens(
            self.prefixes(captions, prefix),
            self.endings(prefix[1], suffixes),
            token_budget=token_budget,
            on_batch=on_batch,
        )

    @torch.inference_mode()
    def embed_tokens(
        self,
        prefixes: Sequence[Sequence[int]],
        endings: Sequence[Sequence[int]],
        *,
        token_budget: int | None = None,
        on_batch: Callable[[int], object] = lambda _: None,
    ) -> torch.Tensor:
        """The same for captions that are tokenized already.

        Args:
            prefixes: tokens of each of the N prefixes, as returned by `prefixes`.
            endings: tokens of each of the K suffixes, as returned by `endings`.
            token_budget: tokens of a batch, including padding; affects speed, and results only by
                rounding. That of the speed settings by default.
            on_batch: called after each batch with its number of captions. A GPU may still be
                computing it.

        Returns:
            (N, K, D) float32 on the CPU, in the order of `prefixes`.
        """
        tail = sum(map(len, endings))
        results = _Results(torch.empty(len(prefixes), len(endings), self.dim))
        budget = token_budget or self.speed.token_budget
        for rows in plan([len(ids) for ids in prefixes], tail, budget):
            results.put(rows, self._states([prefixes[row] for row in rows], endings))
            on_batch(len(rows))
        return results.all()

    def _states(
        self, prefixes: Sequence[Sequence[int]], endings: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """(B, K, D) hidden states of a batch at the last token of each facet."""
        layout = Layout(
            torch.tensor([len(ids) for ids in prefixes]),
            [len(ids) for ids in endings],
            positions=self.options.positions,
            dtype=self.dtype,
            device=self.device,
            attention=self.speed.attention,
        )
        # The padding is never attended to.
        padded = nn.utils.rnn.pad_sequence([*map(torch.tensor, prefixes)], batch_first=True)
        tail = torch.tensor([*chain(*endings)])
        ids = moved(torch.cat([padded, tail.expand(len(prefixes), -1)], dim=1), self.device)
        states = self.model(ids, position_ids=layout.positions, facets=layout, use_cache=False)
        return states.last_hidden_state

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


class _Results:
    """Rows of results on the CPU, each copied one batch late, while a GPU computes the next."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out
        self._late: tuple[Sequence[int], torch.Tensor, torch.cuda.Event | None] | None = None

    def put(self, rows: Sequence[int], values: torch.Tensor) -> None:
        """Take the results of some rows, of any float type and on any device."""
        self._fetch()
        copied = None
        if values.device.type == "cuda":
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._late = rows, values, copied

    def all(self) -> torch.Tensor:
        """All rows, once they are there."""
        self._fetch()
        return self._out

    def _fetch(self) -> None:
        if self._late is not None:
            rows, values, copied = self._late
            if copied is not None:
                copied.synchronize()
            self._out[rows] = values.float()
            self._late = None


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
