"""Tables of the paper, their rows and columns, and its claims."""

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from flame.study.schema.knowledge import Knows
from flame.study.schema.section import Section


class Reported(Section):
    """Numbers of the paper: a CSV file with one number per row."""

    file: str
    match: dict[str, str | int] = Field(
        default={}, description="column -> value; selects rows of the file"
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
    chance: float | None = Field(
        default=None, ge=0, le=100, description="value of a guess, in percent; null: not shown"
    )

    @property
    def printed(self) -> Measure:
        """Its name in the reported numbers."""
        return Measure(
            benchmark=self.reported_benchmark or self.benchmark,
            metric=self.reported_metric or self.metric,
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metrics that this column averages."""
        if not self.mean_of:
            return (Measure(benchmark=self.benchmark, metric=self.metric),)
        return tuple(
            Measure(benchmark=m, metric=self.metric) if isinstance(m, str) else m
            for m in self.mean_of
        )


class Row(Section):
    """A row of a table: one run, or only reported numbers."""

    label: str
    run: str | None = Field(default=None, description="null: reported numbers only")
    reported: dict[str, str | int] | None = Field(
        default=None,
        description="column -> value that selects this row in the reported numbers; null: none",
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
    """A table of the paper, one of our own, or a check against published numbers."""

    title: str
    row_header: str
    rows: tuple[Row, ...] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    reported: Reported | None = Field(default=None, description="null: a table of our own")
    tolerance: PositiveFloat | None = Field(
        default=None,
        description="largest difference, in points, from the reported number: turns the table into "
        "a check with one verdict per number; null: the table shows both without a verdict",
    )

    @model_validator(mode="after")
    def _can_be_checked(self) -> "Table":
        if self.tolerance is not None and self.reported is None:
            raise ValueError("tolerance: there are no reported numbers to check against")
        for row in self.rows:
            if self.reported is None and row.reported is not None:
                raise ValueError(f"row {row.label!r}: the table names no file of reported numbers")
            if self.tolerance is not None and row.reported is None:
                raise ValueError(f"row {row.label!r} has no reported numbers to check against")
        return self

    @property
    def runs(self) -> tuple[str, ...]:
        """Runs of its rows."""
        return tuple(run for row in self.rows for run in (row.run, row.gain_over) if run)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Metrics of its columns."""
        return tuple(measure for column in self.columns for measure in column.measures)


class AppendixTable(Section):
    """A table of the study itself: a recipe (Tables A1, A2) or the prompts (Appendix B)."""

    title: str
    of: Literal["recipe", "prompts"]
    recipe: str | None = Field(default=None, description="name of the recipe, if `of` is recipe")
    reported: Reported

    @model_validator(mode="after")
    def _recipe_is_named(self) -> "AppendixTable":
        if (self.recipe is not None) != (self.of == "recipe"):
            raise ValueError("recipe: required if `of` is 'recipe', and not allowed otherwise")
        return self


class Claim(Section):
    """A claim of the paper, and the results that test it."""

    text: str
    where: str = Field(description="place in the paper")
    table: str | None = Field(default=None, description="table under which it is printed")
    better: str | None = Field(default=None, description="run that the paper says is better")
    worse: str | None = Field(default=None, description="than this run")
    measures: tuple[Measure, ...] = Field(
        default=(), description="compared in the unweighted mean of these metrics"
    )
    ratio: str | None = Field(default=None, description="a ratio of the study's `overhead`")
    above: float | None = Field(
        default=None, description="value that the ratio exceeds according to the paper"
    )
    reported: float | None = Field(
        default=None, description="the paper's difference, in points, or its ratio"
    )
    knows: Knows | None = Field(default=None, description="compares probes of `knowledge`")
    untested: str | None = Field(default=None, description="why this study cannot test it")

    @model_validator(mode="after")
    def _one_kind(self) -> "Claim":
        compared = [self.better is not None, self.worse is not None, bool(self.measures)]
        kinds = [all(compared), *(x is not None for x in (self.ratio, self.knows, self.untested))]
        if sum(kinds) != 1 or (any(compared) and not all(compared)):
            raise ValueError(
                "needs better, worse and measures, or ratio and above, or knows, or untested"
            )
        if (self.ratio is not None or self.knows is not None) and self.table is not None:
            raise ValueError("table: a claim of this kind is only in the list, under no table")
        if (self.ratio is None) != (self.above is None):
            raise ValueError("ratio and above: give both or none")
        return self

    @property
    def runs(self) -> tuple[str, ...]:
        """Runs that it compares."""
        return tuple(run for run in (self.better, self.worse) if run)
