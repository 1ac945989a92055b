"""Backbones, recipes and the runs of every method."""

import difflib
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from flame.study.schema.section import Section


@cache
def timm_names() -> list[str]:
    """Names in timm's registry, read from its source: importing it would import torch.

    Empty where timm is not installed, as in an environment that holds only Snakemake.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return []
    sources = (Path(spec.origin).parent / "models").glob("*.py")
    return [n for p in sources for n in re.findall(r"@register_model\s+def (\w+)", p.read_text())]


def _facet_choice(value: Any) -> Any:
    counts = isinstance(value, int) and not isinstance(value, bool) and value > 0
    names = isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value)
    if value == "default" or counts or names:
        return tuple(value) if names else value
    raise ValueError(
        f"{value!r} is neither 'default', nor a number of facets, nor a list of facets"
    )


FacetChoice = Annotated[Any, BeforeValidator(_facet_choice)]


class Backbone(Section):
    """A timm model, used as the visual backbone."""

    timm: str = Field(description="model name in timm's registry")
    image_size: PositiveInt = Field(description="side of the square input, pixels")
    args: dict[str, Any] = Field(default={}, description="more arguments of timm.create_model")

    @field_validator("timm")
    @classmethod
    def _known_to_timm(cls, name: str) -> str:
        names = timm_names()
        if names and name.split(".")[0] not in names:
            near = difflib.get_close_matches(name, names, n=5)
            raise ValueError(f"unknown timm model {name!r}; the nearest known: {', '.join(near)}")
        return name


class Augment(Section):
    """Augmentation of training images. There is no flip: captions speak of left and right."""

    scale: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(1.0, 1.0), description="range of the share of the area that a random crop keeps"
    )
    shift: NonNegativeInt = Field(default=0, description="largest random translation, pixels")


class Recipe(Section):
    """How a tower is trained (Section 3.1, Tables A1 and A2)."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(description="images per step, summed over all processes")
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    betas: tuple[float, float] = Field(
        default=(0.9, 0.98), description="of AdamW; release: (0.9, 0.95)"
    )
    eps: PositiveFloat = 1e-8
    warmup_steps: NonNegativeInt
    gradient_clip: PositiveFloat | None = Field(
        default=None, description="largest gradient norm; null: no clipping"
    )
    loss: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="Eq. 1, or the release's multi-positive sigmoid"
    )
    tau: PositiveFloat = Field(default=0.07, description="initial temperature")
    max_scale: PositiveFloat = Field(default=100.0, description="largest 1/tau")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="of the softmax loss; Long-CLIP: 0.1"
    )
    weigh: Literal["facets", "kinds"] = Field(
        default="facets",
        description="what has equal weight in the loss: every facet (the sum of Eq. 1), or every "
        "caption kind, whose weight is divided among its facets",
    )
    facets_per_step: PositiveInt | Literal["all"] = Field(
        default="all", description="facets drawn at each step; paper: all, release: 6 of 11"
    )
    projector: Literal["pooled", "per_token"] = Field(
        default="pooled",
        description="two-layer MLP on the pooled feature (paper), or a LayerNorm and the MLP on "
        "every patch token before pooling (release)",
    )
    projector_width: PositiveInt | None = Field(
        default=None, description="hidden width of the MLP; null: the width of the text embeddings"
    )
    standardize: Literal["none", "center"] = Field(
        default="none",
        description="center: subtract the mean training embedding of each (kind, facet)",
    )
    resize: Literal["fit", "fast"] = Field(
        default="fit",
        description="of images that are not square: by Pillow; or by torch after decoding JPEGs at "
        "a reduced size, which takes half the time and changes the pixels slightly",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay per step of a moving average of the weights, the result of a training; "
        "null: the last weights (paper)",
    )
    augment: Augment = Augment()
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="of the towers; auto: bfloat16 on hardware that supports it"
    )
    checkpoint_minutes: PositiveFloat = Field(
        default=2.0, description="minutes between two checkpoints for resuming"
    )


class TextTower(Section):
    """The trainable text tower of a baseline: open_clip's text transformer and tokenizer."""

    width: PositiveInt = Field(description="of the transformer; open_clip's ViT-B/16 has 512")
    layers: PositiveInt = Field(description="open_clip's ViT-B/16: 12")
    heads: PositiveInt = Field(description="open_clip's ViT-B/16: 8")
    context_length: PositiveInt = Field(
        default=77, description="tokens; longer texts are truncated"
    )
    embed_dim: PositiveInt = Field(description="width of the joint embedding space")


class HubFile(Section):
    """One file of a hub repository."""

    id: str
    revision: str = Field(description="commit")
    file: str


class Validation(Section):
    """What is measured of a tower during its training. It changes no weights."""

    benchmarks: tuple[str, ...] = Field(min_length=1, description="names of `benchmarks`")
    every: PositiveInt = Field(default=1, description="epochs between two validations")
    images: PositiveInt | None = Field(
        default=None, description="evenly spread images of each data set; null: all"
    )


class _Run(Section):
    recipe: str
    seeds: tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="one training per seed; null: the study's seeds"
    )
    validation: Validation | None = Field(
        default=None, description="during training; null: the study's validation"
    )


class FlameRun(_Run):
    """FLAME: a tower trained on the embeddings of a frozen LLM (Section 3)."""

    method: Literal["flame"] = "flame"
    dataset: str
    llm: str
    backbone: str
    targets: dict[str, FacetChoice] = Field(
        min_length=1,
        description="caption kind -> facets to match: 'default', a number to draw, or a list",
    )
    draws: tuple[NonNegativeInt, ...] = Field(
        default=(0,),
        min_length=1,
        description="random draws of facets, for targets that are numbers: one for all trainings, "
        "or one for each seed",
    )
    weights: HubFile | None = Field(
        default=None,
        description="trained weights of the official release, used instead of training",
    )


class ClipRun(_Run):
    """CLIP, a baseline: image and text tower trained together with the symmetric InfoNCE loss."""

    method: Literal["clip"]
    dataset: str
    backbone: str
    text_tower: str
    captions: str = Field(default="raw", description="caption kind; CLIP trains on raw captions")


class LongClipRun(_Run):
    """Long-CLIP, a baseline: a CLIP fine-tuned on long and short captions."""

    method: Literal["long-clip"]
    base: str = Field(description="CLIP run that it is fine-tuned from")
    dataset: str | None = Field(default=None, description="null: the data set of its base")
    long: str = "long"
    short: str = "short"
    context_length: PositiveInt = Field(default=248, description="tokens, after stretching")
    kept_positions: NonNegativeInt = Field(
        default=20, description="leading positional embeddings that are not stretched"
    )
    components: PositiveInt = Field(
        default=32,
        description="principal components of the image features that meet short captions",
    )

    @model_validator(mode="after")
    def _two_kinds(self) -> "LongClipRun":
        if self.long == self.short:
            raise ValueError(f"long and short: both are captions of kind {self.long!r}")
        return self


class OpenClipTower(Section):
    """A pretrained model of open_clip, with its own preprocessing and tokenizer."""

    source: Literal["open_clip"]
    name: str = Field(description="open_clip's name of the architecture")
    tag: str = Field(
        description="open_clip's name of the weights, which says where they are on the hub"
    )


class TransformersTower(Section):
    """A pretrained CLIP of transformers, with its own preprocessing and tokenizer."""

    source: Literal["transformers"]
    id: str = Field(description="hub id or folder")
    revision: str | None = Field(default=None, description="commit; null for a folder only")


class PretrainedRun(Section):
    """A pretrained baseline, evaluated as it is."""

    method: Literal["pretrained"]
    tower: Annotated[OpenClipTower | TransformersTower, Field(discriminator="source")]
    licence: str = Field(description="of the weights")


def _method(run: Any) -> str:
    return run.get("method", "flame") if isinstance(run, Mapping) else run.method


Run = Annotated[
    Annotated[FlameRun, Tag("flame")]
    | Annotated[ClipRun, Tag("clip")]
    | Annotated[LongClipRun, Tag("long-clip")]
    | Annotated[PretrainedRun, Tag("pretrained")],
    Discriminator(_method),
]
