"""The baselines: CLIP, and Long-CLIP, which stretches a CLIP to long captions (Table 1).

Their text tower is trained with the image tower: open_clip's transformer over its byte pairs.

Shapes: B images of this process, A images of all processes, K texts of each image, T texts, L
tokens, W width of the text transformer, D width of the space where image and text meet.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from open_clip.tokenizer import tokenize
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from flame.runtime.checksums import read_json, verified
from flame.runtime.errors import known
from flame.study.schema.runs import Backbone, Recipe, TextTower
from flame.study.settings import ClipTraining, LongClipTraining
from flame.towers import model
from flame.towers.model import Outputs, Tower
from flame.training.processes import gather, rank

# The one facet of a caption that is read as it is.
FACET = "tokens"


class Tokens:
    """Captions of one kind of a data set, as the tokens of open_clip's byte-pair encoding.

    A caption is encoded when it is first asked for.

    Attributes:
        keys: key of each of the N rows; a key may have several.
        facets: the one that there is.
        dim: L.
    """

    def __init__(
        self, captions: Path, kind: str, context_length: int, *, cache_bytes: int = 0
    ) -> None:
        """Open the captions of a kind.

        Args:
            captions: `captions.parquet` of a data set.
            kind: of the captions.
            context_length: L; longer captions are cut, and end with the end token all the same.
            cache_bytes: if the tokens of all rows fit into this, they are kept.

        Raises:
            ValueError: a kind without captions.
        """
        table = pl.read_parquet(verified(captions))
        rows = table.filter(pl.col("kind") == kind)
        if rows.is_empty():
            kinds = table["kind"].unique(maintain_order=True)
            raise ValueError(f"{captions} has no captions of kind {known(kind, kinds)}")
        self.keys: list[str] = rows["key"].to_list()
        self.facets = (FACET,)
        self.dim = context_length
        self._texts = rows["text"]
        fits = len(rows) * context_length * np.dtype(np.int32).itemsize <= cache_bytes
        self._kept = np.zeros((len(rows), context_length), np.int32) if fits else None

    def rows(self, indices: np.ndarray, facets: Sequence[str] | None = None) -> np.ndarray:
        """Rows by number, in any order, some perhaps several times.

        Args:
            indices: (n,) integers in [0, N).
            facets: as `Embeddings.rows` takes them; there is only one.

        Returns:
            (n, 1, L) int32: start token, caption, end token, zeros.
        """
        if self._kept is None:
            return self._encode(indices)[:, None]
        # Every text begins with the start token, which is not 0.
        new = np.unique(indices[self._kept[indices, 0] == 0])
        if len(new):
            self._kept[new] = self._encode(new)
        return self._kept[indices][:, None]

    def _encode(self, indices: np.ndarray) -> np.ndarray:
        texts = [self._texts[int(i)] for i in indices]
        return tokenize(texts, self.dim).numpy().astype(np.int32)


class ClipTower(Tower):
    """Visual backbone with a linear projection, and a text transformer beside it.

    What a recipe says of FLAME's projector and of centers does not concern it.
    """

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        text_tower: TextTower,
        context_length: int | None = None,
    ) -> None:
        """Make an untrained tower.

        Args:
            backbone: visual backbone.
            recipe: has temperature and loss.
            text_tower: sizes of the text transformer, and D.
            context_length: L, if it is not the text tower's.
        """
        super().__init__(backbone, recipe, text_tower.embed_dim)
        self.projection = nn.Linear(self.visual.head_hidden_size, self.dim, bias=False)
        self.context_length = context_length or text_tower.context_length
        self.text: Any = TextTransformer(
            context_length=self.context_length,
            width=text_tower.width,
            heads=text_tower.heads,
            layers=text_tower.layers,
            output_dim=self.dim,
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D), as `Tower` says."""
        return self.projection(self.visual(self._pixels(images)))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (T, L) int64 of texts: start token, text (cut if too long), end token, zeros."""
        return tokenize(list(texts), self.context_length)

    def encode_text(self, texts: Sequence[str], language: str | None = None) -> Tensor:
        """Text features (T, D), not normalised, on the device of the tower; of any language."""
        return self.encode_tokens(self.tokenize(texts).to(self.log_scale.device))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Text features (T, D), not normalised, of tokens (T, L) of any integer type."""
        text, tokens = self.text, tokens.long()
        # The end token has the highest number. No token sees those behind it, so zeros that
        # stand behind the end of every text can be left out.
        ends = tokens.argmax(dim=-1)
        length = int(ends.max()) + 1
        x = text.token_embedding(tokens[:, :length]) + text.positional_embedding[:length]
        with _attention(tokens.device):
            x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = x[torch.arange(len(x), device=x.device), ends]
        return text.ln_final(x) @ text.text_projection

    def forward(self, images: Tensor, texts: Tensor, columns: Tensor) -> Outputs:
        """Features of a batch, as `Tower` says; `texts` are tokens (B, K, L)."""
        features = [self.encode_tokens(tokens) for tokens in texts.unbind(dim=1)]
        return Outputs(
            self.encode_image(images),
            torch.stack(features, dim=1),
            self.log_scale.exp(),
            self.bias,
        )


class LongClipTower(ClipTower):
    """A CLIP whose positional embedding is stretched and partly frozen.

    Its loss is that of the long captions and that of the short ones, which meet only the principal
    components of the image features (Long-CLIP, ECCV 2024, and its release).
    """

    def __init__(self, settings: LongClipTraining) -> None:
        """Make an untrained tower; `start_from` gives it the weights of a CLIP."""
        super().__init__(
            settings.backbone, settings.recipe, settings.text_tower, settings.context_length
        )
        self.settings = settings
        parametrize.register_parametrization(
            self.text, "positional_embedding", _Kept(settings.kept_positions)
        )
        # original0: the rows that are kept. What is no trained parameter does not decay either.
        self.text.parametrizations.positional_embedding.original0.requires_grad_(False)

    def start_from(self, folder: Path) -> None:
        """Take the weights of a trained CLIP; the temperature begins anew, at the recipe's.

        Args:
            folder: of the CLIP run.

        Raises:
            ValueError: a run of another method or of other sizes.
        """
        record = read_json(verified(folder / "run.json"))["settings"]
        own = self.settings.model_dump(mode="json") | {"method": "clip"}
        for name in ("method", "backbone", "text_tower"):
            if record.get(name) != own[name]:
                raise ValueError(f"{folder}: {name} {record.get(name)!r}, not {own[name]!r}")
        base, _ = model.load(folder)
        weights = base.state_dict()
        kept = self.settings.kept_positions
        rows = stretched(weights.pop("text.positional_embedding"), self.context_length, kept)
        name = "text.parametrizations.positional_embedding.original"
        weights |= {f"{name}0": rows[:kept], f"{name}1": rows[kept:]}
        self.load_state_dict(weights | {"log_scale": self.log_scale, "bias": self.bias})

    def loss(self, outputs: Outputs, columns: Tensor) -> Tensor:
        """Sum () of the losses of long and of short captions, in float32."""
        images = functional.normalize(outputs.images.float(), dim=-1)
        losses = []
        for k, column in enumerate(columns.tolist()):
            short = self.facets[column][0] == self.settings.short
            met = _coarse(images, self.settings.components) if short else images
            texts = outputs.texts[:, k : k + 1].float()
            losses.append(self.criterion(met, texts, outputs.scale, outputs.bias, None))
        return torch.stack(losses).sum()


def create(settings: ClipTraining | LongClipTraining, base: Path | None = None) -> ClipTower:
    """A tower of a run, untrained but for what a Long-CLIP has from its base.

    Args:
        settings: the run.
        base: folder of the CLIP run that a Long-CLIP starts from.
    """
    if isinstance(settings, ClipTraining):
        return ClipTower(settings.backbone, settings.recipe, settings.text_tower)
    tower = LongClipTower(settings)
    if base is not None:
        tower.start_from(base)
    return tower


def stretched(positions: Tensor, length: int, kept: int) -> Tensor:
    """A positional embedding for longer texts, by linear interpolation behind the first rows.

    Row j >= kept is read at kept + (j - kept) / r, r = (length - kept) / (L - kept): between two
    old rows, or behind the last one, on the line through the last two. So 77 rows become the 248
    of Long-CLIP with kept = 20 and r = 4.

    Args:
        positions: (L, W).
        length: number of rows wanted.
        kept: first rows, which stay as they are.

    Returns:
        (length, W).

    Raises:
        ValueError: nothing is left to interpolate.
    """
    old = len(positions)
    if not kept + 2 <= old <= length:
        raise ValueError(f"{old} positions, {kept} of them kept, cannot become {length}")
    behind = torch.arange(length - kept, dtype=torch.float64)
    places = kept + behind * (old - kept) / (length - kept)
    lower = places.long().clamp(max=old - 2)
    share = (places - lower)[:, None].to(positions.dtype)
    rows = positions[lower] + share * (positions[lower + 1] - positions[lower])
    return torch.cat([positions[:kept], rows])


def principal(features: Tensor, components: int) -> Tensor:
    """Features with nothing left of them but their mean and their first principal components.

    The gradient is that of the projection on these axes, which turn with the features. It is
    written down, because that of an SVD divides by the gap between any two singular values, also
    where both are 0. This one knows only the gaps between an axis that stays and one that goes.

    Args:
        features: (A, D).
        components: number of axes that stay.

    Returns:
        (A, D).
    """
    if components >= min(len(features) - 1, features.shape[1]):
        return features
    mean = features.mean(dim=0)
    centered = features - mean
    with torch.no_grad():
        wide = centered.double()
        variances, axes = torch.linalg.eigh(wide.T @ wide)  # rising
        gaps = variances[-components:, None] - variances[None, :-components]
        gaps = gaps.clamp(min=1e-6 * float(variances[-1])).to(features)
        stay, go = axes[:, -components:].to(features), axes[:, :-components].to(features)
    inside, outside = centered @ stay, centered @ go  # (A, components), (A, D - components)
    # First order of perturbation: how far each axis that stays turns to each that goes. It is 0.
    turn = inside.T @ outside / gaps
    turn = turn - turn.detach()
    return mean + inside @ (stay.T + turn @ go.T) + outside @ turn.T @ stay.T


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The faster way to compute attention: on a CPU the plain one, for texts are short there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _coarse(images: Tensor, components: int) -> Tensor:
    """Principal components (B, D) of this process's image features, over those of all processes."""
    reduced = principal(gather(images), components)
    first = len(images) * rank()
    return reduced[first : first + len(images)]


class _Kept(nn.Module):
    """A matrix (L, W) whose first rows are a tensor of their own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, kept: Tensor, others: Tensor) -> Tensor:
        return torch.cat([kept, others])

    def right_inverse(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix[: self.rows].clone(), matrix[self.rows :].clone()
