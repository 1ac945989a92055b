"""Benchmarks, few-shot trials, intervals and what is timed."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from flame.study.schema.section import Section

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


class Overhead(Section):
    """What is timed for Figure 5, in one job that has all cores to itself."""

    run: str = Field(description="FLAME run whose data, LLM, backbone and recipe are taken")
    baseline: str = Field(description="CLIP run of the same data and backbone")
    captions: PositiveInt = Field(description="long captions that are embedded in each way")
    steps: PositiveInt = Field(description="training steps of each kind")
    rounds: PositiveInt = Field(default=3, description="times that all is measured, in turn")


def task_names() -> list[str]:
    """Kinds of benchmark: the modules under `flame.tasks`, not imported, and the stage few-shot."""
    folder = Path(__file__).parents[2] / "evaluation" / "tasks"
    modules = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    return [*modules, FEWSHOT]
