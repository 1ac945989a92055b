"""Embedding and training timed against their alternatives (Figure 5, Section 4.4).

All ways take turns in one process, round after round, so that load on the machine affects all of
them alike; ratios are taken within a round.

Shapes: N captions, K facets, D width of the LLM; B captions and L tokens of a batch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import nn

from flame.data import captions
from flame.data.images import ImageReader
from flame.embedding.attention import Layout, facet_mask
from flame.embedding.llm import FrozenLLM, plan
from flame.embedding.store import Embeddings, by_kind
from flame.runtime import progress
from flame.runtime.requests import Request
from flame.study.settings import ClipTraining, EmbedSettings, FlameTraining, OverheadSettings
from flame.towers.base import Centers
from flame.towers.load import create
from flame.training.pairs import Batches, Pairs, Texts
from flame.training.processes import Place
from flame.training.tokens import FACET, Tokens
from flame.training.trainer import Trainer

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
ONLINE = 20  # steps on stored embeddings for each step with the LLM, which is that much slower
CACHE_BYTES = 2 << 30


class Way(NamedTuple):
    """Something to time."""

    run: Callable[[], object]
    units: int
    """Captions embedded, or steps trained, per run."""


def texts_of(images: Path, settings: EmbedSettings) -> tuple[list[str], list[str]]:
    """Keys and texts of the captions of one kind, in the order of the file."""
    rows = captions.of_kind(images / captions.FILE, settings.kind)
    return rows["key"].to_list(), rows["text"].to_list()


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


class OnlineTexts:
    """Captions that the frozen LLM embeds during training, in place of a store."""

    def __init__(self, encoder: FrozenLLM, store: Embeddings, images: Path) -> None:
        """Replace a store.

        Args:
            encoder: the LLM that made the store.
            store: its attributes name the captions and the prompt.
            images: folder of the data set.
        """
        made = {name: store.attributes[name] for name in EmbedSettings.model_fields}
        self._encoder, self._settings = encoder, EmbedSettings.model_validate(made)
        keys, self._texts = texts_of(images, self._settings)
        self.keys = pl.Series(keys)

    def request(self, indices: np.ndarray, facets: Sequence[str]) -> Request:
        """A call that embeds the given rows and facets, in this process only."""
        return partial(self.rows, indices, facets)

    def rows(self, indices: np.ndarray, facets: Sequence[str]) -> np.ndarray:
        """Embeddings (n, K, D) float16 of the given rows and facets."""
        texts, _ = self._encoder.prepare([self._texts[i] for i in indices])
        suffixes = [self._settings.facets[facet] for facet in facets]
        return self._encoder.embed(texts, self._settings.prefix, suffixes).half().numpy()


class Run(NamedTuple):
    """A training, some steps of which are timed."""

    settings: FlameTraining | ClipTraining
    texts: Mapping[str, Texts]
    targets: Mapping[str, Sequence[str]]
    centers: Centers
    steps: int


def runs(
    images: Path, stores: Sequence[Path], encoder: FrozenLLM, settings: OverheadSettings
) -> dict[str, Run]:
    """FLAME on stored embeddings, CLIP with its text tower, FLAME with the LLM in the loop.

    Raises:
        ValueError: the batch sizes differ.
    """
    steps, flame, baseline = settings.overhead.steps, settings.flame, settings.clip
    sizes = flame.recipe.batch_size, baseline.recipe.batch_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"steps of {sizes[0]} and {sizes[1]} images are not comparable")
    stored = {
        kind: Embeddings.open(parts, flame.dataset, cache_bytes=CACHE_BYTES)
        for kind, parts in by_kind(stores).items()
    }
    online = {kind: OnlineTexts(encoder, store, images) for kind, store in stored.items()}
    centers: Centers = {}
    if flame.recipe.standardize == "center":
        means = {kind: torch.from_numpy(store.mean()) for kind, store in stored.items()}
        centers = {k: dict(zip(stored[k].facets, mean, strict=True)) for k, mean in means.items()}
    tokens = Tokens(
        images / captions.FILE,
        baseline.captions,
        baseline.text_tower.context_length,
        cache_bytes=CACHE_BYTES,
    )
    words = {baseline.captions: (FACET,)}
    return {
        "flame": Run(flame, stored, flame.targets, centers, steps),
        "clip": Run(baseline, {baseline.captions: tokens}, words, {}, steps),
        "online": Run(flame, online, flame.targets, centers, max(1, steps // ONLINE)),
    }


def training_way(run: Run, images: Path, encoder: FrozenLLM, folder: Path) -> Way:
    """Steps as `flame.train` takes them, after an untimed one if there are several.

    Args:
        run: the training.
        images: folder of the data set.
        encoder: gives the width of the embeddings and the device.
        folder: where the trainer would write checkpoints.
    """
    settings, recipe = run.settings, run.settings.recipe
    pairs = Pairs(
        ImageReader(images),
        run.texts,
        run.targets,
        image_size=settings.backbone.image_size,
        resize=settings.recipe.resize,
        max_skipped=settings.max_skipped,
        cache_bytes=CACHE_BYTES,
    )
    batches = Batches(
        pairs,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,  # steps past the last epoch are like those before
        seed=settings.seed,
        facets_per_step=recipe.facets_per_step if settings.method == "flame" else "all",
    )
    torch.manual_seed(settings.seed)
    tower = create(settings, encoder.dim)
    tower.centers = dict(run.centers)
    trainer = Trainer(tower, batches, settings, folder, Place(0, 1, encoder.device))

    def train(steps: int) -> None:
        for _ in range(steps):  # without the logging and progress bar of `Trainer.run`
            trainer.advance(batches[trainer.step])

    if run.steps > 1:
        train(1)
    return Way(lambda: train(run.steps), run.steps)
