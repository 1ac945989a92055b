"""Benchmarks, few-shot trials, confidence intervals and timings."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from flame.study.schema.section import Section

FEWSHOT = "fewshot"  # the task that needs the LLM, and therefore a stage of its own


class Trial(Section):
    """One column of few-shot classification (Table C5)."""

    ways: PositiveInt = Field(description="classes to choose from")
    shots: PositiveInt = Field(description="inner shots: examples per class in the prompt")
    repeats: NonNegativeInt = Field(description="how often the examples are repeated")

    @property
    def metric(self) -> str:
        """Its name, as in the reported numbers."""
        plural = "" if self.repeats == 1 else "s"
        return f"{self.ways}-way {self.shots}-shot {self.repeats} repetition{plural}"


class FewShot(Section):
    """In-context classification from words that images map to (Section C.3)."""

    facet: str = Field(
        description="facet whose mean and norm are restored to a feature before the LLM reads it"
    )
    pool: PositiveInt = Field(description="words per image: pool x pool")
    contrast: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="null: the most probable token stands for a feature (paper). Otherwise a whole "
        "word does: of those at least this share as probable as the most probable one, the one "
        "that is most of all more probable than at the center of the training captions",
    )
    episodes: PositiveInt = Field(description="queries per trial")
    trials: tuple[Trial, ...] = Field(min_length=1)
    pictures: PositiveInt = Field(
        default=8, description="images whose words are stored for a figure"
    )
    picture_pool: PositiveInt = Field(default=4, description="words per side of such an image")


class Benchmark(Section):
    """A task on a data set."""

    task: str = Field(description="module under src/flame/evaluation/tasks")
    dataset: str
    captions: str | None = Field(
        default=None,
        description="caption kind to match; `class` for zero-shot; null for a probe",
    )
    facets: Literal["trained", "default"] | tuple[str, ...] = Field(
        default="trained",
        description="facets whose embeddings are averaged: those the run was trained on, the "
        "default of the prompt, or a list",
    )
    center: str | None = Field(
        default=None,
        description="training caption kind whose mean is subtracted if the recipe says center; "
        "null: the same kind",
    )
    negatives: str | None = Field(
        default=None, description="caption kind of false captions, for the task `compose`"
    )
    train: str | None = Field(
        default=None, description="data set that the task `probe` trains its classifier on"
    )
    language: str | None = Field(
        default=None, description="of its texts, for towers that need to know it (NLLB-CLIP)"
    )
    fewshot: FewShot | None = Field(default=None, description="settings of the task `fewshot`")
    stand_in: bool | None = Field(
        default=None,
        description="whether the data set stands in for a benchmark of this name; null: if a "
        "program draws it",
    )

    @model_validator(mode="after")
    def _check_task(self) -> "Benchmark":
        for key, task in (("train", "probe"), ("fewshot", "fewshot")):
            if (getattr(self, key) is not None) != (self.task == task):
                raise ValueError(f"{key}: belongs to the task {task!r}, and to no other")
        if (self.captions is None) != (self.task == "probe"):
            raise ValueError("captions: required by every task except 'probe', which has none")
        return self


class Evaluation(Section):
    """How towers are evaluated."""

    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of forward passes; bfloat16: autocast. Similarities are float32 in both",
    )


class Bootstrap(Section):
    """Bootstrap over queries, for every 95 % interval."""

    resamples: PositiveInt = 1000
    seed: int = 0


class Overhead(Section):
    """Timings for Figure 5, taken by one job that has all cores to itself."""

    run: str = Field(description="FLAME run whose data, LLM, backbone and recipe are timed")
    baseline: str = Field(description="CLIP run on the same data and backbone")
    captions: PositiveInt = Field(description="long captions that each alternative embeds")
    steps: PositiveInt = Field(description="training steps of each alternative")
    rounds: PositiveInt = Field(
        default=3, description="rounds, in each of which all alternatives are timed in turn"
    )


def task_names() -> list[str]:
    """Tasks: the modules of `flame.evaluation.tasks`, found by file name, and few-shot."""
    folder = Path(__file__).parents[2] / "evaluation" / "tasks"
    modules = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    return [*modules, FEWSHOT]
