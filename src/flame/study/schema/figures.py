"""Figures of the paper, one class a kind."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from flame.study.schema.section import Section
from flame.study.schema.tables import Column


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
