"""Vocabulary mapping: patches of an image -> words of the frozen LLM (Section C.3).

The paper writes C_i = M(h(f_I(x_i))): f_I gives a feature for every patch, in the space of the
LLM's last hidden state; h is the LLM's own head; M takes the most probable token.

Some LLMs begin an answer with "The", whatever the image. With `contrast`, M takes the word whose
probability is raised most above that at the center of the training captions, among the plausible
ones: contrastive decoding (arXiv 2210.15097, Section 3.2), with the center as the amateur.

Shapes: B images; h x w positions, pooled to p x p; D width of the LLM; V tokens.
"""

import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.data.images import ImageReader
from flame.embedding import provenance
from flame.embedding.store import SHARD_ROWS, Embeddings, by_kind
from flame.evaluation.decoding import Decoder
from flame.runtime.checksums import sha256, verify
from flame.runtime.device import device_of, dtype_of
from flame.runtime.errors import known
from flame.study.memory import WORDS
from flame.study.settings import FewShotSettings, FlameTraining
from flame.towers.flame import FlameTower
from flame.towers.load import load

log = logging.getLogger(__name__)

# Pixels between two positions of a convolutional map, as in the paper's ViT-B/16. At half the usual
# 32, every other position of the dilated map is a position of the original one; at 8, the average
# pooling in the shortcuts of some ResNets would differ from the one that was trained.
STRIDE = 16
SPACES = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write a space


class Place(NamedTuple):
    """Center of the hidden states of one facet, and their mean distance from it."""

    center: Tensor
    """(D,), zero where the tower was trained without a center."""
    radius: float
    """Mean norm of a hidden state minus the center."""


class Words(NamedTuple):
    """The most probable token at every position."""

    tokens: Tensor
    """(B, p, p) ids."""
    probabilities: Tensor
    """(B, p, p) in [0, 1], among all V tokens."""


def dilated(tower: FlameTower, training: FlameTraining) -> FlameTower:
    """The same tower with a finer map: late strides become dilations, weights stay.

    Args:
        tower: a trained tower.
        training: settings of its training.

    Returns:
        A copy of the tower, or the tower itself if its backbone is a transformer or has no dilated
        form.
    """
    if hasattr(tower.visual, "num_prefix_tokens"):
        return tower
    backbone = training.backbone
    finer = backbone.model_copy(update={"args": backbone.args | {"output_stride": STRIDE}})
    try:
        copied = FlameTower(finer, training.recipe, tower.dim)
    except (ValueError, AssertionError, NotImplementedError) as error:
        log.info("%s cannot be dilated: %s", backbone.timm, error)
        return tower
    copied.load_state_dict(tower.state_dict())
    copied.centers = tower.centers
    return copied.train(tower.training)


@torch.inference_mode()
def patch_features(tower: FlameTower, images: Tensor) -> Tensor:
    """Features of every position, (B, h, w, D): head and projector applied to each on its own.

    Args:
        tower: visual tower in evaluation mode.
        images: (B, 3, H, W) square, pixels in [0, 1].

    Raises:
        ValueError: the backbone has no features per position.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    states = tower.visual.forward_features((images - tower.mean) / tower.std)
    name = type(tower.visual).__name__
    if hasattr(tower.visual, "num_prefix_tokens"):
        if not tower.per_token:
            if getattr(tower.visual, "attn_pool", None) is not None:
                raise ValueError(f"{name} pools by attention: it has no value per position")
            states = tower.visual.fc_norm(states)
        states = states[:, tower.visual.num_prefix_tokens :]
        side = math.isqrt(states.shape[1])
        return tower.projector(states.unflatten(1, (side, side)))
    if states.ndim != 4 or states.shape[1] != tower.visual.num_features:
        raise ValueError(
            f"{name} returns {tuple(states.shape)}, neither tokens nor a map (B, C, h, w)"
        )
    cells = states.permute(0, 2, 3, 1)
    pooled = tower.visual.forward_head(cells.reshape(-1, states.shape[1], 1, 1))
    return tower.projector(pooled).view(*cells.shape[:3], -1)


def pool(features: Tensor, side: int) -> Tensor:
    """Average pooling of a map, (B, h, w, D) -> (B, p, p, D) with p = `side`.

    Raises:
        ValueError: `side` exceeds the map.
    """
    height, width = features.shape[1:3]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"cannot pool {height} x {width} positions to {side} x {side} words")
    return adaptive_avg_pool2d(features.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def place(texts: Embeddings, facet: str, center: Tensor | None) -> Place:
    """Center and radius of the LLM's hidden states under one facet.

    Args:
        texts: embeddings of the training captions of one kind.
        facet: a facet of theirs.
        center: (D,), the vector subtracted from them in training, if any.
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

    The losses compare cosines with texts from which a center may have been subtracted, so features
    carry neither length nor center; both are restored before the LLM's head reads them.
    """
    return where.center.to(features) + where.radius * normalize(features, dim=-1)


class Speaker:
    """A frozen LLM with its head, for next-token scores.

    Attributes:
        tokenizer: its tokenizer.
        head: (V, D) float32, maps a last hidden state to scores of all tokens.
        num_layers: number of decoder layers.
        max_tokens: context length.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Load a checkpoint on the GPU if there is one, in bfloat16 where the hardware supports it.

        Weights are read in the precision that they are stored in, straight onto the device: 2 bytes
        a parameter of a bfloat16 checkpoint, and V x D x 4 of the head.

        Args:
            checkpoint: folder with a `transformers` model and its tokenizer. The head may be that
                of a causal LM or tied to the token embeddings.

        Raises:
            ValueError: the checkpoint has no head or is broken.
        """
        verify(checkpoint)
        device = device_of()
        dtype = dtype_of("auto", device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", device_map={"": device}, output_loading_info=True
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{checkpoint} lacks {', '.join(sorted(info['missing_keys']))}: its head would "
                "have random weights; vocabulary mapping needs an LLM with a head, or a tied one"
            )
        # Scores in bfloat16 would tie: its resolution near 16 is 1/8.
        self.head: Tensor = model.get_output_embeddings().weight.detach().float()
        self.model: Any = model.base_model.eval()
        if model.dtype != dtype:
            self.model.to(dtype)
        self.num_layers: int = model.config.num_hidden_layers
        self.max_tokens: int = model.config.max_position_embeddings

    @property
    def dim(self) -> int:
        """D, width of a hidden state."""
        return self.head.shape[1]

    @cached_property
    def whole(self) -> Tensor:
        """(V,) bool: tokens that are a word of two letters or more, with the space before it."""
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(len(self.head))))
        found = [bool(p) and p[0] in SPACES and len(p) > 2 and p[1:].isalpha() for p in pieces]
        if not any(found):
            raise ValueError("no token of the LLM is a whole word, as `fewshot.contrast` needs")
        return torch.tensor(found, device=self.head.device)

    @torch.inference_mode()
    def words(
        self,
        states: Tensor,
        *,
        center: Tensor | None = None,
        contrast: float | None = None,
        chunk: int = WORDS,
    ) -> Words:
        """A token for every hidden state, with its probability.

        Args:
            states: (B, p, p, D) last hidden states, after the final norm.
            center: (D,) hidden state that the states are compared with, for `contrast`.
            contrast: as in `FewShot`; None: the most probable token.
            chunk: states per product; each needs 4 V numbers in memory.

        Raises:
            ValueError: a contrast, but no token of the LLM is a whole word.
        """
        tokens, probabilities = [], []
        for part in states.flatten(0, -2).to(self.head).split(chunk):
            scores = (part @ self.head.T).log_softmax(dim=-1)  # (chunk, V)
            if contrast is None:
                token = scores.argmax(dim=-1)
            else:
                assert center is not None
                token = self._contrasted(scores, center, contrast)
            tokens.append(token.cpu())
            probabilities.append(scores.gather(-1, token[:, None])[:, 0].exp().cpu())
        shape = states.shape[:-1]
        return Words(torch.cat(tokens).view(shape), torch.cat(probabilities).view(shape))

    def _contrasted(self, scores: Tensor, center: Tensor, contrast: float) -> Tensor:
        """(N,) plausible words that are most of all more probable than at the center."""
        whole = scores.masked_fill(~self.whole, -torch.inf)
        plausible = whole >= whole.amax(dim=-1, keepdim=True) + math.log(contrast)
        usual = (self.head @ center.to(self.head)).log_softmax(dim=-1)
        return (scores - usual).masked_fill_(~plausible, -torch.inf).argmax(dim=-1)

    def text(self, token: int) -> str:
        """One token as a word without surrounding space; empty for special tokens."""
        return " ".join(self.tokenizer.decode([token], skip_special_tokens=True).split())

    def ids(self, text: str) -> list[int]:
        """Tokens of a text; names of special tokens in it are read as plain text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def start(self) -> list[int]:
        """Tokens that the tokenizer puts before a text: its BOS token, or none."""
        return [i for i in self.tokenizer("").input_ids if i == self.tokenizer.bos_token_id]

    @torch.inference_mode()
    def read(self, ids: Sequence[int], memory: Any = None) -> tuple[Tensor, Any]:
        """Read tokens after those that were read before.

        Args:
            ids: one or more tokens.
            memory: key-value cache of the tokens before; is changed.

        Returns:
            (D,) last hidden state at the last token, and the cache with these tokens in it.

        Raises:
            ValueError: the context length is exceeded.
        """
        length = len(ids) + (memory.get_seq_length() if memory else 0)
        if length > self.max_tokens:
            raise ValueError(f"a prompt has {length} tokens, the LLM takes {self.max_tokens}")
        batch = torch.tensor([list(ids)], device=self.head.device)
        out = self.model(batch, past_key_values=memory, use_cache=True)
        return out.last_hidden_state[0, -1].float(), out.past_key_values

    def scores(self, state: Tensor, tokens: Sequence[int]) -> Tensor:
        """Scores of some tokens, given a last hidden state (D,)."""
        return self.head[list(tokens)] @ state


class Mapper:
    """Images of a data set -> words: tower, center and radius, head (C_i = M(h(f_I(x_i))))."""

    def __init__(
        self,
        tower: FlameTower,
        training: FlameTraining,
        speaker: Speaker,
        where: Place,
        contrast: float | None,
        batch_size: int,
        decoder: Decoder,
    ) -> None:
        """Combine the parts.

        Args:
            tower: a trained tower in evaluation mode.
            training: settings of its training.
            speaker: the LLM on whose embeddings it was trained.
            where: place of the facet that features are read as.
            contrast: how a word is chosen, as in `FewShot`.
            batch_size: images per forward pass.
            decoder: of the images.
        """
        self._tower = dilated(tower, training).to(speaker.head.device)
        self._image_size = training.backbone.image_size
        self._speaker, self._where, self._contrast = speaker, where, contrast
        self._batch_size, self._decoder = batch_size, decoder

    @classmethod
    def open(
        cls,
        model: Path,
        llm: Path,
        speaker: Speaker,
        stores: Sequence[Path],
        settings: FewShotSettings,
        batch_size: int,
        decoder: Decoder | None = None,
    ) -> "Mapper":
        """Mapper of a trained tower, with the place of its features from its training captions.

        Args:
            model: folder of the tower.
            llm: folder of the LLM.
            speaker: the LLM, loaded.
            stores: embedding stores of the training captions, every part of the kind in `settings`.
            settings: kind and facet that features are read as.
            batch_size: images per forward pass.
            decoder: of the images; in this process by default.

        Raises:
            ValueError: the tower, the stores and the LLM's head do not belong together.
        """
        if not settings.final_norm:
            raise ValueError("final_norm is false, but the LLM's head reads states after the norm")
        tower, record = load(model)
        if not isinstance(tower, FlameTower):
            raise ValueError(
                f"{model} was trained by method {record['settings']['method']!r}, "
                "whose features no LLM can read; only those of 'flame' can be"
            )
        training = FlameTraining.model_validate(record["settings"])
        parts, kind, facet = by_kind(stores), settings.captions, settings.fewshot.facet
        if kind not in parts:
            raise ValueError(f"no embeddings of captions of kind {known(kind, parts)}")
        texts = Embeddings.open(parts[kind], training.dataset)
        _check_head(texts, tower, speaker, llm)
        if "texts" in record:
            provenance.check(record["texts"], texts, [facet], kind)
        centers = tower.centers.get(kind, {})
        if tower.centers and facet not in centers:
            raise ValueError(
                f"the tower has no center of {kind} captions and facet {known(facet, centers)}"
            )
        where = place(texts, facet, centers.get(facet))
        contrast = settings.fewshot.contrast
        return cls(tower, training, speaker, where, contrast, batch_size, decoder or Decoder())

    def words(self, reader: ImageReader, images: Sequence[int], side: int) -> Words:
        """Words of some images, (B, p, p) with p = `side`."""
        parts, device = [], self._speaker.head.device
        decoded = self._decoder.batches(reader, images, self._image_size, "fit", self._batch_size)
        for batch in decoded:
            pixels = batch.to(device, non_blocking=True).float() / 255
            features = pool(patch_features(self._tower, pixels), side)
            states, center = hidden_states(features, self._where), self._where.center
            parts.append(self._speaker.words(states, center=center, contrast=self._contrast))
        return Words(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def texts(self, reader: ImageReader, images: Sequence[int], side: int) -> list[str]:
        """Words of each image as one text, row by row."""
        tokens = self.words(reader, images, side).tokens.flatten(1).tolist()
        return [" ".join(filter(None, map(self._speaker.text, row))) for row in tokens]


def _check_head(texts: Embeddings, tower: FlameTower, speaker: Speaker, llm: Path) -> None:
    """Refuse embeddings, or a tower, that the head of the LLM cannot read."""
    layer = texts.attributes.get("layer", "last")
    if layer not in ("last", speaker.num_layers):
        raise ValueError(
            f"the captions' embeddings are of layer {layer}: the LLM's head reads the last, "
            f"{speaker.num_layers}"
        )
    if not tower.dim == texts.dim == speaker.dim:
        raise ValueError(
            f"the tower has features of width {tower.dim}, its captions' embeddings {texts.dim}, "
            f"the LLM's head reads {speaker.dim}"
        )
    checkpoint = sha256(llm / "flame.json")
    if texts.attributes.get("checkpoint", checkpoint) != checkpoint:
        raise ValueError(
            f"{llm} is not the LLM {texts.attributes['llm']!r} that embedded the captions: its "
            f"flame.json has sha256 {checkpoint}, not {texts.attributes['checkpoint']}"
        )
