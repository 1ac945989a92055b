"""What each stage is given, as JSON: the part of the study that decides its numbers."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from flame.study import names
from flame.study.schema.benchmarks import Bootstrap, FewShot, Overhead
from flame.study.schema.data import Captioner
from flame.study.schema.figures import Figure
from flame.study.schema.knowledge import Knowledge
from flame.study.schema.llms import Checkpoint, Facet, LLMOptions, Prompt
from flame.study.schema.runs import (
    Backbone,
    HubFile,
    OpenClipTower,
    Recipe,
    TextTower,
    TransformersTower,
)
from flame.study.schema.section import Section
from flame.study.schema.tables import AppendixTable, Claim, Column, Table

# Raise a stage's number when a change of its code changes its results. It is a parameter of the
# stage's rule, so Snakemake recomputes exactly those results.
VERSION = {
    "download": 1,
    "caption": 2,
    "embed": 2,
    "train": 2,
    "evaluate": 2,
    "fewshot": 1,
    "knowledge": 1,
    "overhead": 2,
    "export": 1,
    "table": 3,
    "figure": 3,
}


class CaptionSettings(Section):
    """All that decides the captions of one part of a data set's images."""

    dataset: str
    part: NonNegativeInt
    parts: PositiveInt
    captioner: Captioner
    version: int


class CaptionsSettings(Section):
    """All that decides the joined captions of a data set."""

    dataset: str
    captioner: Captioner
    max_skipped: float
    version: int


class _StoreRows(Section):
    kind: str
    datasets: tuple[str, ...]
    part: NonNegativeInt
    parts: PositiveInt
    llm: str


# Snakemake compares settings as JSON text, so the order of fields matters. Pydantic orders them
# from the last base class to the first.
class EmbedSettings(LLMOptions, _StoreRows):
    """All that decides the rows and the numbers of an embedding store."""

    storage: Literal["float16", "fp8", "int8"]
    prefix: tuple[str, str]
    facets: dict[str, str] = Field(description="name -> suffix, in the order of the columns")
    version: int


class FlameTraining(Section):
    """All that decides the weights of a FLAME run."""

    method: Literal["flame"] = "flame"
    run: str
    seed: int
    dataset: str
    backbone: Backbone
    recipe: Recipe
    targets: dict[str, tuple[str, ...]] = Field(description="caption kind -> facets")
    max_skipped: float
    version: int


class ClipTraining(Section):
    """All that decides the weights of a CLIP run."""

    method: Literal["clip"]
    run: str
    seed: int
    dataset: str
    backbone: Backbone
    recipe: Recipe
    text_tower: TextTower
    captions: str
    max_skipped: float
    version: int


class LongClipTraining(Section):
    """All that decides the weights of a Long-CLIP run, given those of its base."""

    method: Literal["long-clip"]
    run: str
    seed: int
    dataset: str
    backbone: Backbone
    recipe: Recipe
    text_tower: TextTower = Field(description="of the CLIP it starts from")
    long: str
    short: str
    context_length: int
    kept_positions: int
    components: int
    max_skipped: float
    version: int


Training = Annotated[FlameTraining | ClipTraining | LongClipTraining, Field(discriminator="method")]


class PretrainedTower(Section):
    """A pretrained tower, evaluated as it is."""

    method: Literal["pretrained"]
    run: str
    tower: Annotated[OpenClipTower | TransformersTower, Field(discriminator="source")]
    licence: str
    version: int


class ReleasedTower(Section):
    """A FLAME tower with the weights of the official release."""

    method: Literal["released"]
    training: FlameTraining = Field(description="how it was trained")
    weights: HubFile
    version: int


# What `flame.towers.load.load` loads.
AnyTower = Annotated[
    FlameTraining | ClipTraining | LongClipTraining | PretrainedTower,
    Field(discriminator="method"),
]


class Reading(Section):
    """How texts of a kind become vectors."""

    prefix: tuple[str, str]
    facets: dict[str, str] = Field(description="name -> suffix, of those that are averaged")
    center: str | None = Field(description="caption kind whose mean vectors are subtracted")


class _Exported(Section):
    run: str
    checkpoint: Checkpoint
    reset: int | None


class ExportSettings(LLMOptions, _Exported):
    """An exported FLAME."""

    kinds: dict[str, Reading] = Field(description="kind of texts -> how they are read")
    version: int


class Question(Section):
    """A benchmark, resolved for one run."""

    benchmark: str
    name: str = Field(
        default_factory=lambda given: given.get("benchmark", ""),
        description="what it is called: `nouns (for ImageNet-1k)`; by default the benchmark",
    )
    task: str
    dataset: str
    captions: str | None = None
    facets: tuple[str, ...] = ()
    center: str | None = None
    negatives: str | None = None
    train: str | None = None
    language: str | None = None


class EvaluateSettings(Section):
    """The benchmarks of one bundle, for one run."""

    run: str
    questions: tuple[Question, ...]
    precision: Literal["float32", "bfloat16"] = "float32"
    bootstrap: Bootstrap
    version: int


class ValidationSettings(Section):
    """What is validated during a training. It decides no weights, so it is in no fingerprint."""

    questions: tuple[Question, ...] = ()
    every: PositiveInt = Field(default=1, description="epochs between two validations")
    images: PositiveInt | None = Field(default=None, description="of each data set; null: all")


class FewShotSettings(Section):
    """A few-shot benchmark, resolved for one run."""

    run: str
    benchmark: str
    name: str = Field(
        default_factory=lambda given: given.get("benchmark", ""),
        description="what it is called: `nouns (for MiniImageNet)`; by default the benchmark",
    )
    dataset: str
    captions: str = Field(description="training caption kind whose center and length are used")
    fewshot: FewShot
    final_norm: bool = Field(description="whether embeddings were read after the LLM's final norm")
    seed: int
    bootstrap: Bootstrap
    version: int


class KnowledgeSettings(Section):
    """The probes of one LLM's embeddings."""

    llm: str
    dataset: str
    captions: str
    facets: tuple[str, ...]
    attributes: tuple[str, ...]
    folds: int
    penalties: tuple[float, ...]
    seed: int
    bootstrap: Bootstrap
    version: int


class OverheadSettings(Section):
    """The timings of Figure 5."""

    overhead: Overhead
    flame: FlameTraining
    clip: ClipTraining
    embedding: EmbedSettings
    version: int


class Compared(Section):
    """A run, as it is compared with others."""

    trainings: tuple[str, ...] = Field(min_length=1, description="one per seed")
    method: str | None = Field(
        description="its trainings differ as much as those of other runs of this method; null: a "
        "tower that was not trained here"
    )
    drawn: bool = Field(description="whether its facets are drawn at random among more")

    @property
    def kind(self) -> tuple[str, bool] | None:
        """Runs of one kind have trainings that differ as much; None: it was not trained here."""
        return None if self.method is None else (self.method, self.drawn)


class _Comparison(Section):
    """Anything made from results of runs, with the trainings and data sets behind its names."""

    study: str
    datasets: dict[str, str] = Field(description="benchmark -> data set")
    stand_ins: tuple[str, ...] = Field(
        default=(), description="benchmarks whose data set only stands in for them"
    )
    runs: dict[str, Compared] = Field(
        description="those compared, and those that tell how trainings differ"
    )
    version: int

    @property
    def measured(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """What `flame.study.names.of_measures` needs."""
        return self.datasets, self.stand_ins

    def called(self, benchmark: str) -> str:
        """What a benchmark is called beside a measured number."""
        stand_in = benchmark in self.stand_ins
        return names.called(benchmark, [self.datasets[benchmark]], stand_in=stand_in)


class TableSettings(_Comparison):
    """A table, with the names it uses resolved."""

    name: str
    table: Table
    claims: tuple[Claim, ...] = Field(description="those printed under it")


class ClaimsSettings(_Comparison):
    """All claims, with the names they use resolved."""

    claims: tuple[Claim, ...]
    probed: "Probed | None" = Field(default=None, description="probes, for claims on them")


class Probed(Section):
    """What the probes of all LLMs are shown with."""

    block: Knowledge
    facets: dict[str, Facet] = Field(description="in the order of the prompt")
    bootstrap: Bootstrap


class KnowledgeTableSettings(Section):
    """The table of what each prompt knows."""

    study: str
    probed: Probed
    version: int


class VarianceSettings(_Comparison):
    """Everything that the tables show, of the runs that were trained several times."""

    tables: dict[str, tuple[Column, ...]]


class AppendixSettings(Section):
    """A table of the study itself, with the parts of the study that it shows."""

    study: str
    name: str
    table: AppendixTable
    recipe: Recipe | None
    backbones: tuple[str, ...] = Field(description="those trained with the recipe")
    facets: dict[str, Facet]
    prompts: dict[str, Prompt]
    version: int


class FigureSettings(_Comparison):
    """A figure, with the names it uses resolved."""

    name: str
    figure: Figure
    prefix: tuple[str, str] | None = Field(default=None, description="of the prompt, for a mask")
    facets: dict[str, str] = Field(default={}, description="name -> suffix, for a mask")
    speaker: tuple[str, float | None] | None = Field(
        default=None, description="LLM and `fewshot.contrast`, for words"
    )
    averaged: dict[str, tuple[str, ...]] = Field(
        default={}, description="caption kind -> facets whose vectors are averaged, for captions"
    )
    probed: Probed | None = Field(default=None, description="probes, for knowledge")
