"""Vocabulary mapping: patches of an image -> words of the frozen LLM (Section C.3).

The paper writes C_i = M(h(f_I(x_i))): f_I gives a feature for every patch, in the space of the
LLM's last hidden state; h is the LLM's own head; M takes the token of the highest probability.

Shapes: B images; h x w positions, pooled to p x p; D width of the LLM; V tokens.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.data.images import ImageReader
from flame.embedding.llm import fast_dtype
from flame.embedding.store import SHARD_ROWS, Embeddings
from flame.runtime.checksums import verify
from flame.study.settings import FlameTraining
from flame.towers.flame import FlameTower

log = logging.getLogger(__name__)

# Pixels between two positions of a convolutional map, as in the paper's ViT-B/16. At half the usual
# 32, every other position of the dilated map is a position of the plain one; at 8 pixels the
# averages in the shortcuts of some ResNets would no longer be those that were trained.
STRIDE = 16


class Place(NamedTuple):
    """Where the hidden states of one facet lie: around a center, at a distance."""

    center: Tensor
    """(D,), zero where the tower was trained without a center."""
    radius: float
    """Mean norm of what is left of a hidden state without the center."""


class Words(NamedTuple):
    """The token of the highest probability at every position."""

    tokens: Tensor
    """(B, p, p) ids."""
    probabilities: Tensor
    """(B, p, p) in [0, 1], among all V tokens."""


def dilated(tower: FlameTower, training: FlameTraining) -> FlameTower:
    """The same tower with a finer map: later strides become dilations, no weight changes.

    Args:
        tower: a trained tower.
        training: what it was made from.

    Returns:
        A copy of the tower, or the tower itself if its backbone is of tokens or cannot be dilated.
    """
    if hasattr(tower.visual, "num_prefix_tokens"):
        return tower
    backbone = training.backbone
    finer = backbone.model_copy(update={"args": backbone.args | {"output_stride": STRIDE}})
    try:
        copied = FlameTower(finer, training.recipe, tower.dim)
    except (ValueError, AssertionError, NotImplementedError) as error:
        log.info("%s keeps its own map of positions: %s", backbone.timm, error)
        return tower
    copied.load_state_dict(tower.state_dict())
    copied.centers = tower.centers
    return copied.train(tower.training)


@torch.inference_mode()
def patch_features(tower: FlameTower, images: Tensor) -> Tensor:
    """Features of every position, (B, h, w, D): head and projector on one position at a time.

    Args:
        tower: visual tower in evaluation mode.
        images: (B, 3, H, W) square, pixels in [0, 1].

    Raises:
        ValueError: a backbone whose positions cannot be told apart.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    states = tower.visual.forward_features((images - tower.mean) / tower.std)
    name = type(tower.visual).__name__
    if hasattr(tower.visual, "num_prefix_tokens"):
        if not tower.per_token:
            if getattr(tower.visual, "attn_pool", None) is not None:
                raise ValueError(f"{name} pools by attention, which has no value at one position")
            states = tower.visual.fc_norm(states)
        states = states[:, tower.visual.num_prefix_tokens :]
        side = math.isqrt(states.shape[1])
        return tower.projector(states.unflatten(1, (side, side)))
    if states.ndim != 4 or states.shape[1] != tower.visual.num_features:
        raise ValueError(
            f"{name} gives {tuple(states.shape)}, neither tokens nor a map (B, C, h, w)"
        )
    cells = states.permute(0, 2, 3, 1)
    pooled = tower.visual.forward_head(cells.reshape(-1, states.shape[1], 1, 1))
    return tower.projector(pooled).view(*cells.shape[:3], -1)


def pool(features: Tensor, side: int) -> Tensor:
    """Means over the parts of a map, (B, h, w, D) -> (B, p, p, D) with p = `side`.

    Raises:
        ValueError: more parts than there are positions.
    """
    height, width = features.shape[1:3]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"{side} x {side} words of a map of {height} x {width} positions")
    return adaptive_avg_pool2d(features.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def place(texts: Embeddings, facet: str, center: Tensor | None) -> Place:
    """Where the LLM's hidden states lie under one facet.

    Args:
        texts: embeddings of the training captions of one kind.
        facet: one of theirs.
        center: (D,), what was subtracted from them in training, if anything was.
    """
    middle = torch.zeros(texts.dim) if center is None else center.cpu()
    total = 0.0
    for start in range(0, len(texts.keys), SHARD_ROWS):
        rows = np.arange(start, min(start + SHARD_ROWS, len(texts.keys)))
        vectors = torch.from_numpy(texts.rows(rows, [facet])[:, 0]).float()
        total += (vectors - middle).norm(dim=-1).sum(dtype=torch.float64).item()
    return Place(middle, total / len(texts.keys))


def hidden_states(features: Tensor, where: Place) -> Tensor:
    """Features as hidden states of the LLM, (..., D): `center + radius * direction`.

    The losses compare cosines with texts from which a center may have been subtracted, so a tower
    knows neither length nor center; both are put back before the LLM's head can read a feature.
    """
    return where.center.to(features) + where.radius * normalize(features, dim=-1)


class Speaker:
    """A frozen LLM that reads tokens and says which come next.

    Attributes:
        tokenizer: its tokenizer.
        head: (V, D) float32, what turns a last hidden state into scores of all tokens.
        num_layers: its decoder layers.
        max_tokens: tokens that it can read.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Load a checkpoint on the GPU if there is one, in bfloat16 where hardware computes in it.

        Args:
            checkpoint: folder with a `transformers` model and its tokenizer. The head may be that
                of a causal model, or be tied to the token embeddings.

        Raises:
            ValueError: the checkpoint has no head, or is broken.
        """
        verify(checkpoint)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{checkpoint} lacks {', '.join(sorted(info['missing_keys']))}: its head would be "
                "random; the vocabulary mapping needs an LLM with a head, or with a tied one"
            )
        # Scores in bfloat16 would tie: near 16 its steps are 1/8.
        self.head: Tensor = model.get_output_embeddings().weight.detach().clone().to(device)
        self.model: Any = model.base_model.to(device, fast_dtype(device)).eval()
        self.num_layers: int = model.config.num_hidden_layers
        self.max_tokens: int = model.config.max_position_embeddings

    @property
    def dim(self) -> int:
        """D, the length of a hidden state."""
        return self.head.shape[1]

    @torch.inference_mode()
    def words(self, states: Tensor, *, chunk: int = 1024) -> Words:
        """The most probable token of every hidden state.

        Args:
            states: (B, p, p, D) last hidden states, after the final norm.
            chunk: states at a time; each needs V scores in memory.
        """
        tokens, probabilities = [], []
        for part in states.flatten(0, -2).to(self.head).split(chunk):
            scores = part @ self.head.T  # (chunk, V)
            best, token = scores.max(dim=-1)
            tokens.append(token.cpu())
            probabilities.append((best - scores.logsumexp(dim=-1)).exp().cpu())
        shape = states.shape[:-1]
        return Words(torch.cat(tokens).view(shape), torch.cat(probabilities).view(shape))

    def text(self, token: int) -> str:
        """One token as a word: without the space before it; special tokens are empty."""
        return " ".join(self.tokenizer.decode([token], skip_special_tokens=True).split())

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, in which a special token's name is text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def start(self) -> list[int]:
        """What this tokenizer puts before a text: its BOS token, or nothing."""
        return [i for i in self.tokenizer("").input_ids if i == self.tokenizer.bos_token_id]

    @torch.inference_mode()
    def read(self, ids: Sequence[int], memory: Any = None) -> tuple[Tensor, Any]:
        """Read tokens after those that were read before.

        Args:
            ids: one or more tokens.
            memory: keys and values of what was read before; is changed.

        Returns:
            (D,) last hidden state at the last token, and the memory with these tokens in it.

        Raises:
            ValueError: more tokens than this LLM takes.
        """
        length = len(ids) + (memory.get_seq_length() if memory else 0)
        if length > self.max_tokens:
            raise ValueError(f"a prompt has {length} tokens, this LLM takes {self.max_tokens}")
        batch = torch.tensor([list(ids)], device=self.head.device)
        out = self.model(batch, past_key_values=memory, use_cache=True)
        return out.last_hidden_state[0, -1].float(), out.past_key_values

    def scores(self, state: Tensor, tokens: Sequence[int]) -> Tensor:
        """Scores of some tokens after a hidden state (D,), one each."""
        return self.head[list(tokens)] @ state


class Mapper:
    """Images of a data set -> words: tower, center and length, head (C_i = M(h(f_I(x_i))))."""

    def __init__(
        self,
        tower: FlameTower,
        training: FlameTraining,
        speaker: Speaker,
        where: Place,
        batch_size: int,
    ) -> None:
        """Put the parts together.

        Args:
            tower: a trained tower in evaluation mode.
            training: what it was made from.
            speaker: the LLM on whose embeddings it was trained.
            where: place of the facet as which a feature is read.
            batch_size: images per forward pass.
        """
        self._tower = dilated(tower, training).to(speaker.head.device)
        self._image_size = training.backbone.image_size
        self._speaker, self._where, self._batch_size = speaker, where, batch_size

    def words(self, reader: ImageReader, images: Sequence[int], side: int) -> Words:
        """Words of some images, (B, p, p) with p = `side`."""
        parts = []
        for start in range(0, len(images), self._batch_size):
            rows = images[start : start + self._batch_size]
            pixels = reader.load(rows, self._image_size).to(self._speaker.head.device)
            features = pool(patch_features(self._tower, pixels.float() / 255), side)
            parts.append(self._speaker.words(hidden_states(features, self._where)))
        return Words(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def texts(self, reader: ImageReader, images: Sequence[int], side: int) -> list[str]:
        """Words of each image as one text, line by line."""
        tokens = self.words(reader, images, side).tokens.flatten(1).tolist()
        return [" ".join(filter(None, map(self._speaker.text, row))) for row in tokens]
