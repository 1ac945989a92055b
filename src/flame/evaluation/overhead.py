"""Embedding timed against its alternatives, and whatever is to be timed in turn (Figure 5).

All ways take turns in one process, round after round, so that load on the machine affects all of
them alike; ratios are taken within a round.

`flame.evaluation.steps` has the training steps.

Shapes: N captions, K facets, D width of the LLM; B captions and L tokens of a batch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import nn

from flame.data import captions
from flame.embedding.attention import Layout, facet_mask
from flame.embedding.llm import FrozenLLM, plan
from flame.runtime import progress
from flame.study.settings import EmbedSettings

# Ratio -> names of its numerator and denominator.
RATIOS = {
    f"{slow}/{fast}": (slow, fast)
    for slow, fast in (
        ("separate", "one_pass"),
        ("separate", "everything"),
        ("clip", "flame"),
        ("online", "flame"),
    )
}
AGREEMENT = 0.99  # least cosine between embeddings of a caption in two ways, given bfloat16
WARM_UP = 4  # captions


class Way(NamedTuple):
    """Something to time."""

    run: Callable[[], object]
    units: int
    """Captions embedded, or steps trained, per run."""


def captions_of(images: Path, settings: EmbedSettings) -> pl.DataFrame:
    """Keys and texts of the captions of one kind, in the order of the file."""
    return captions.of_kind(images / captions.FILE, settings.kind)


def in_turn(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds per unit of every way, one value per round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with progress.bar(rounds * len(ways), "measurements", "overhead") as bar:
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way.run()
                seconds[name].append((time.perf_counter() - start) / way.units)
                bar.update()
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum over the rounds of each of `RATIOS`."""
    found = {}
    for name, (slow, fast) in RATIOS.items():
        each = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        found[name] = {"value": median(each), "low": min(each), "high": max(each)}
    return found


class PlainLLM:
    """The same LLM as `transformers` runs it: all tokens in all layers, batches padded.

    It shares its weights with the encoder, so a GPU holds them once.
    """

    def __init__(self, encoder: FrozenLLM) -> None:
        """Take the weights, depth, dtype and norms of the encoder."""
        self.encoder = encoder
        weights = chain(encoder.model.parameters(), encoder.model.buffers())
        self.model: Any = deepcopy(encoder.model, {id(tensor): tensor for tensor in weights})
        self.model.layers[-1] = self.model.layers[-1].layer
        self.model.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def embed(
        self,
        captions: Sequence[str],
        prefix: tuple[str, str],
        suffixes: Sequence[str],
        batches: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Embeddings (N, K, D) equal to those of `FrozenLLM.embed`, in the same batches by default.

        One suffix is an ordinary text under the LLM's own causal mask; several use the mask of
        Section 3.3, materialised for every caption.
        """
        prefixes = self.encoder.prefixes(captions, prefix)
        endings = self.encoder.endings(prefix[1], suffixes)
        lengths, tail = [len(ids) for ids in endings], [*chain(*endings)]
        answers = torch.tensor(lengths).cumsum(0) - 1
        out = torch.empty(len(prefixes), len(endings), self.encoder.dim)
        budget = self.encoder.speed.token_budget
        planned = plan([len(ids) for ids in prefixes], len(tail), budget)
        for rows in planned if batches is None else batches:
            batch = [torch.tensor(prefixes[row] + tail) for row in rows]
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(self.encoder.device)
            starts = [len(prefixes[row]) for row in rows]
            decoupled = self._decoupled(starts, lengths, ids.shape[1]) if len(lengths) > 1 else {}
            states = self.model(ids, use_cache=False, **decoupled).last_hidden_state
            places = torch.tensor(starts)[:, None] + answers
            picked = states[torch.arange(len(rows))[:, None], places]
            out[list(rows)] = picked.float().cpu()
        return out

    def _decoupled(
        self, starts: Sequence[int], lengths: Sequence[int], longest: int
    ) -> dict[str, torch.Tensor]:
        """Mask (B, 1, L, L) and position ids (B, L) of facets after prefixes of given lengths."""
        dtype = self.encoder.dtype
        positions = torch.zeros(len(starts), longest, dtype=torch.long)
        mask = torch.full((len(starts), 1, longest, longest), torch.finfo(dtype).min, dtype=dtype)
        for row, start in enumerate(starts):
            length = start + sum(lengths)
            layout = Layout(
                torch.tensor([start]),
                lengths,
                positions=self.encoder.options.positions,
                dtype=dtype,
            )
            positions[row, :length] = layout.positions[0]
            mask[row, 0, :length, :length].masked_fill_(facet_mask(start, lengths), 0)
        device = self.encoder.device
        return {"attention_mask": mask.to(device), "position_ids": positions.to(device)}


def embedding_ways(
    encoder: FrozenLLM, captions: Sequence[str], settings: EmbedSettings
) -> dict[str, Way]:
    """K passes per caption, one pass under a dense mask, and one pass by `flame.embedding.llm`.

    Raises:
        ValueError: the ways do not produce the same embeddings.
    """
    captions, _ = encoder.prepare(captions)
    plain, prefix = PlainLLM(encoder), settings.prefix
    suffixes = [*settings.facets.values()]

    def separate(texts: Sequence[str]) -> torch.Tensor:
        return torch.cat([plain.embed(texts, prefix, [suffix]) for suffix in suffixes], dim=1)

    functions: dict[str, Callable[[Sequence[str]], torch.Tensor]] = {
        "separate": separate,
        "one_pass": lambda texts: plain.embed(texts, prefix, suffixes),
        "everything": lambda texts: encoder.embed(texts, prefix, suffixes),
    }
    warm = {name: function(captions[:WARM_UP]) for name, function in functions.items()}
    if settings.positions == "running":  # differs from separate passes by definition
        del warm["separate"]
    for name, vectors in warm.items():
        cosine = torch.cosine_similarity(vectors, warm["everything"], dim=-1).min().item()
        if not cosine > AGREEMENT:
            raise ValueError(f"{name!r} and 'everything' differ: cosine {cosine:.4f}")
    return {
        name: Way(lambda function=function: function(captions), len(captions))  # type: ignore[misc]
        for name, function in functions.items()
    }
