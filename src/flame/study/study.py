"""The study: all that is to be computed, and look-ups in it."""

import random
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple, TypeGuard

from pydantic import Field

from flame.study import names
from flame.study.schema.benchmarks import FEWSHOT, Benchmark, Bootstrap, Evaluation, Overhead
from flame.study.schema.data import Captioner, Dataset, PublishedCaptions
from flame.study.schema.figures import Figure
from flame.study.schema.knowledge import Knowledge
from flame.study.schema.llms import LLM, Embedding, Facet, Prompt
from flame.study.schema.runs import (
    Backbone,
    ClipRun,
    FlameRun,
    LongClipRun,
    PretrainedRun,
    Recipe,
    Run,
    TextTower,
    Validation,
)
from flame.study.schema.section import Section
from flame.study.schema.tables import AppendixTable, Claim, Measure, Row, Table
from flame.study.settings import Compared, Question


class Replica(NamedTuple):
    """A training of a run."""

    run: Run
    seed: int
    draw: int
    """Which random draw of facets it has as targets."""


class Study(Section):
    """Everything that is to be computed.

    The look-ups rely on references being valid, which `flame.study.load` checks.

    A *run* is trained once per seed; each of these is a *training* with a name of its own.
    """

    study: str = Field(description="name of the study, shown in every table")
    seed: int = Field(default=0, description="of data, and of draws of facets")
    seeds: tuple[int, ...] | None = Field(
        default=None, description="of trainings, one training per seed; null: the seed above"
    )
    datasets: dict[str, Dataset]
    captioners: dict[str, Captioner] = Field(default={})
    llms: dict[str, LLM]
    facets: dict[str, Facet]
    prompts: dict[str, Prompt]
    embedding: Embedding = Embedding()
    backbones: dict[str, Backbone]
    text_towers: dict[str, TextTower] = Field(default={})
    recipes: dict[str, Recipe]
    runs: dict[str, Run]
    benchmarks: dict[str, Benchmark]
    evaluation: Evaluation = Evaluation()
    bootstrap: Bootstrap = Bootstrap()
    tables: dict[str, Table]
    appendix: dict[str, AppendixTable] = Field(default={})
    figures: dict[str, Figure] = Field(default={})
    claims: dict[str, Claim] = Field(default={})
    overhead: Overhead | None = None
    knowledge: Knowledge | None = None
    validation: Validation | None = Field(
        default=None, description="of every training whose run has none of its own"
    )
    max_skipped: float = Field(
        default=0.01, ge=0, le=1, description="share of rows a stage may skip before it fails"
    )

    # --- data and captions ------------------------------------------------------------------

    def bundle(self, dataset: str) -> str:
        """Bundle of a data set; by default its own name."""
        return self.datasets[dataset].bundle or dataset

    def captioner_of(self, dataset: str, kind: str) -> str | None:
        """Captioner that writes a data set's captions of a kind; None if they are its own."""
        name = self.datasets[dataset].captioner
        if name is None:
            return None
        captioner = self.captioners[name]
        kinds = captioner.files if isinstance(captioner, PublishedCaptions) else captioner.prompts
        return name if kind in kinds else None

    def caption_parts(self, captioner: str, dataset: str) -> int:
        """Number of jobs that write the captions of a data set."""
        published = isinstance(self.captioners[captioner], PublishedCaptions)
        return 1 if published else self.datasets[dataset].captioner_parts

    # --- prompts and embeddings -------------------------------------------------------------

    @cached_property
    def prompt_names(self) -> dict[str, str]:
        """Caption kind -> name of the prompt that embeds it."""
        return {kind: name for name, prompt in self.prompts.items() for kind in prompt.captions}

    def prompt_of(self, kind: str) -> Prompt:
        """Prompt that embeds captions of a kind."""
        return self.prompts[self.prompt_names[kind]]

    def suffixes(self, prompt: Prompt, facets: Iterable[str]) -> dict[str, str]:
        """Facet -> its text in a prompt, after the shared prefix."""
        return {name: prompt.suffix(self.facets[name].text) for name in facets}

    def targets(self, training: str) -> dict[str, tuple[str, ...]]:
        """Caption kind -> facets that a FLAME run is trained to match, in the order of the prompt.

        A number of facets is drawn with the study's seed (Section 4.4: "random sampling").
        """
        resolved = {}
        run, draw = self.flame_run(training), self.trainings[training].draw
        for kind, choice in run.targets.items():
            prompt = self.prompt_of(kind)
            if choice == "default":
                chosen: Iterable[str] = prompt.default
            elif isinstance(choice, int):
                another = f"/{draw}" if draw else ""
                rng = random.Random(f"{self.seed}/{kind}/{choice}{another}")
                chosen = rng.sample(prompt.facets, choice)
            else:
                chosen = choice
            wanted = set(chosen)
            resolved[kind] = tuple(facet for facet in prompt.facets if facet in wanted)
        return resolved

    def embedded_facets(self, llm: str, bundle: str, kind: str) -> tuple[str, ...]:
        """Facets in a store, in the order of the prompt."""
        prompt = self.prompt_of(kind)
        if self.embedding.facets == "all":
            return prompt.facets
        used: set[str] = set()
        for name, (run, _, _) in self.trainings.items():
            if not isinstance(run, FlameRun) or run.llm != llm:
                continue
            if kind in run.targets and self.bundle(run.dataset) == bundle:
                used.update(self.targets(name)[kind])
            for benchmark in self.benchmarks.values():
                asked = kind in (benchmark.captions, benchmark.negatives)
                if asked and benchmark.task != FEWSHOT and self.bundle(benchmark.dataset) == bundle:
                    used.update(self._question_facets(name, benchmark))
        if any((llm, bundle, kind) in self.figure_stores(name) for name in self.figures):
            used.update(prompt.default)
        if self._is_probed(llm, bundle, kind):
            used.update(prompt.facets)
        return tuple(facet for facet in prompt.facets if facet in used)

    def _is_probed(self, llm: str, bundle: str, kind: str) -> bool:
        """Whether the stores of an LLM are probed for what each prompt knows."""
        block = self.knowledge
        if block is None or llm not in block.llms.values() or kind != block.captions:
            return False
        return self.bundle(block.dataset) == bundle

    def parts(self, bundle: str, kind: str) -> int:
        """Number of embedding jobs for the captions of a kind."""
        members = (d for name, d in self.datasets.items() if self.bundle(name) == bundle)
        return max(dataset.parts.get(kind, 1) for dataset in members)

    def bundle_datasets(self, bundle: str, kind: str) -> tuple[str, ...]:
        """Data sets of a bundle whose captions of a kind a run, benchmark or figure uses."""
        flame = [r for r in self.runs.values() if isinstance(r, FlameRun) and not r.weights]
        used = {run.dataset for run in flame if kind in run.targets}
        asked = [b for b in self.benchmarks.values() if b.task != FEWSHOT]
        used |= {b.dataset for b in asked if kind in (b.captions, b.negatives)}
        drawn = [store for figure in self.figures.values() for store in figure.stores()]
        used |= {dataset for _, dataset, of in drawn if of == kind}
        if self.knowledge and self.knowledge.captions == kind:
            used.add(self.knowledge.dataset)
        return tuple(n for n in self.datasets if n in used and self.bundle(n) == bundle)

    # --- runs and their trainings -----------------------------------------------------------

    @cached_property
    def trainings(self) -> dict[str, Replica]:
        """Name of every training -> its run, seed and draw of facets."""
        return {
            name: Replica(run, *chances)
            for key, run in self.runs.items()
            for name, *chances in zip(
                self.replicas(key), self.seeds_of(key), self._draws(key), strict=True
            )
        }

    def replicas(self, run: str) -> tuple[str, ...]:
        """Trainings of a run, one per seed: the first has its name, the others `<run>.seed<n>`."""
        others = self.seeds_of(run)[1:]
        return run, *(f"{run}.seed{seed}" for seed in others)

    def seeds_of(self, run: str) -> tuple[int, ...]:
        """Seeds of the trainings of a run."""
        chosen = self.runs[run]
        if not self._is_trained(chosen):
            return (self.seed,)
        return chosen.seeds or self.seeds or (self.seed,)

    def _draws(self, run: str) -> tuple[int, ...]:
        """Draw of each training of a run: one for all, or one for each."""
        chosen, count = self.runs[run], len(self.seeds_of(run))
        draws = chosen.draws if isinstance(chosen, FlameRun) else (0,)
        return tuple(draws[number % len(draws)] for number in range(count))

    def is_drawn(self, run: str) -> bool:
        """Whether the facets that a run is trained on are drawn at random among more."""
        chosen = self.runs[run]
        return isinstance(chosen, FlameRun) and any(
            isinstance(choice, int) and choice < len(self.prompt_of(kind).facets)
            for kind, choice in chosen.targets.items()
        )

    @staticmethod
    def _is_trained(run: Run) -> TypeGuard[FlameRun | ClipRun | LongClipRun]:
        return not (isinstance(run, PretrainedRun) or (isinstance(run, FlameRun) and run.weights))

    def trained(self, training: str) -> bool:
        """Whether a tower is trained here; pretrained and released ones are not."""
        return self._is_trained(self.run(training))

    def run(self, training: str) -> Run:
        """The run of a training."""
        return self.trainings[training].run

    def flame_run(self, training: str) -> FlameRun:
        """The run of a training on embeddings."""
        run = self.run(training)
        assert isinstance(run, FlameRun)
        return run

    def llm_of(self, training: str) -> str | None:
        """LLM of a FLAME run; None for a baseline, which has a text tower of its own."""
        run = self.run(training)
        return run.llm if isinstance(run, FlameRun) else None

    def base(self, training: str) -> str | None:
        """Training that a Long-CLIP starts from: of the same seed if there is one."""
        run, seed, _ = self.trainings[training]
        if not isinstance(run, LongClipRun):
            return None
        replicas = zip(self.replicas(run.base), self.seeds_of(run.base), strict=True)
        return next((name for name, of in replicas if of == seed), run.base)

    def dataset_of(self, training: str) -> str:
        """Data set that a training learns from."""
        run = self.run(training)
        if isinstance(run, LongClipRun):
            return run.dataset or self.dataset_of(run.base)
        assert not isinstance(run, PretrainedRun)
        return run.dataset

    def baseline_kinds(self, training: str) -> tuple[str, ...]:
        """Caption kinds that a baseline reads as text; none for FLAME, which reads embeddings."""
        match self.run(training):
            case ClipRun(captions=kind):
                return (kind,)
            case LongClipRun(long=long, short=short):
                return long, short
        return ()

    def validation_of(self, training: str) -> Validation | None:
        """What is validated during a training."""
        run = self.run(training)
        return (run.validation or self.validation) if self._is_trained(run) else None

    # --- benchmarks and results -------------------------------------------------------------

    def is_stand_in(self, benchmark: str) -> bool:
        """Whether the data set of a benchmark only stands in for the one of its name."""
        chosen = self.benchmarks[benchmark]
        drawn = self.datasets[chosen.dataset].drawn
        return drawn if chosen.stand_in is None else chosen.stand_in

    def name_of(self, benchmark: str) -> str:
        """What a benchmark is called beside a measured number."""
        measured = [self.benchmarks[benchmark].dataset]
        return names.called(benchmark, measured, stand_in=self.is_stand_in(benchmark))

    def label_of(self, row: Row) -> str:
        """Label of a row, with the training set of its run."""
        run = self.runs.get(row.run) if row.run else None
        if row.run is None or run is None or isinstance(run, PretrainedRun):
            return names.in_label(row.label, None, stand_in=False)
        dataset = self.dataset_of(row.run)
        return names.in_label(row.label, dataset, stand_in=self.datasets[dataset].drawn)

    def evaluated_in(self, benchmark: str) -> str:
        """Bundle that a benchmark is evaluated in: of its data set, or of a probe's training set.

        A probe reads no texts, so it has no store in common with the other benchmarks of its data
        set, and they have no use for its training set.
        """
        chosen = self.benchmarks[benchmark]
        return self.bundle(chosen.train or chosen.dataset)

    def questions(self, training: str, bundle: str | None = None) -> tuple[Question, ...]:
        """Benchmarks as asked of a training: those evaluated in a bundle, or by default all."""
        flame = isinstance(self.run(training), FlameRun)
        return tuple(
            Question(
                benchmark=name,
                name=self.name_of(name),
                task=benchmark.task,
                dataset=benchmark.dataset,
                captions=benchmark.captions,
                facets=self._question_facets(training, benchmark) if flame else (),
                center=(benchmark.center or benchmark.captions) if flame else None,
                negatives=benchmark.negatives,
                train=benchmark.train,
                language=benchmark.language,
            )
            for name, benchmark in self.benchmarks.items()
            if benchmark.task != FEWSHOT and bundle in (None, self.evaluated_in(name))
        )

    def validation_questions(self, training: str) -> tuple[Question, ...]:
        """Benchmarks that are validated during a training, in the order of their list."""
        validation = self.validation_of(training)
        asked = {question.benchmark: question for question in self.questions(training)}
        return tuple(asked[name] for name in validation.benchmarks) if validation else ()

    def _question_facets(self, training: str, benchmark: Benchmark) -> tuple[str, ...]:
        if benchmark.captions is None:
            return ()
        prompt = self.prompt_of(benchmark.captions)
        if isinstance(benchmark.facets, tuple):
            return benchmark.facets
        trained = self.targets(training).get(benchmark.center or benchmark.captions)
        return trained if benchmark.facets == "trained" and trained else prompt.default

    def results(self, runs: Iterable[str], measures: Iterable[Measure]) -> tuple[str, ...]:
        """Results with some metrics, as paths below `results` without extensions."""
        found: dict[str, None] = {}
        benchmarks = dict.fromkeys(measure.benchmark for measure in measures)
        for training in (name for run in dict.fromkeys(runs) for name in self.replicas(run)):
            for name in benchmarks:
                benchmark = self.benchmarks[name]
                if benchmark.task == FEWSHOT:
                    found[f"fewshot/{training}/{name}"] = None
                else:
                    found[f"evaluate/{training}/{self.evaluated_in(name)}"] = None
        return tuple(found)

    # --- comparisons ------------------------------------------------------------------------

    def compared(self, run: str) -> Compared:
        """What intervals need to know of a run."""
        chosen = self.runs[run]
        method = chosen.method if self._is_trained(chosen) else None
        drawn = self.is_drawn(run)
        return Compared(trainings=self.replicas(run), method=method, drawn=drawn)

    def comparison(
        self, runs: Iterable[str], groups: Iterable[Iterable[Measure]]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Runs and results that are needed to compare some runs.

        Args:
            runs: those compared.
            groups: measures whose mean is compared, for each comparison.

        Returns:
            The runs, with others that tell how trainings differ; and the results of all, as paths
            below `results` without extensions.
        """
        runs = tuple(dict.fromkeys(runs))
        every, found = dict.fromkeys(runs), dict[str, None]()
        for group in groups:
            measures = tuple(group)
            others = self._replicated(runs, {measure.benchmark for measure in measures})
            every |= dict.fromkeys(others)
            found |= dict.fromkeys(self.results([*runs, *others], measures))
        return tuple(every), tuple(found)

    def _replicated(self, runs: Iterable[str], benchmarks: set[str]) -> list[str]:
        """Runs with several trainings, of the kinds of these, that all benchmarks are asked of."""
        kinds = {self.compared(run).kind for run in runs} - {None}
        return [
            run
            for run, asked in self._asked.items()
            if benchmarks <= asked
            and len(self.replicas(run)) > 1
            and self.compared(run).kind in kinds
        ]

    @cached_property
    def _asked(self) -> dict[str, set[str]]:
        """Run -> benchmarks of all tables, claims and figures that it occurs in."""
        uses = [(table.runs, table.measures) for table in self.tables.values()]
        uses += [(claim.runs, claim.measures) for claim in self.claims.values()]
        figures = [figure.uses() for figure in self.figures.values()]
        uses += [(tuple(runs), tuple(measures)) for runs, measures in figures]
        asked: dict[str, set[str]] = {}
        for runs, measures in uses:
            for run in runs:
                asked.setdefault(run, set()).update(measure.benchmark for measure in measures)
        return asked

    def table_comparison(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Runs and results that a table is made of, and the claims printed under it."""
        table = self.tables[name]
        runs, found = self.comparison(table.runs, [column.measures for column in table.columns])
        more = self.claims_comparison(self.claims_under(name))
        return tuple(dict.fromkeys([*runs, *more[0]])), tuple(dict.fromkeys([*found, *more[1]]))

    def claims_under(self, table: str) -> tuple[Claim, ...]:
        """Claims that are printed under a table."""
        return tuple(c for c in self.claims.values() if c.table == table and c.untested is None)

    def claims_comparison(self, claims: Iterable[Claim]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Runs and results that some claims are tested on."""
        pairs = [self.comparison(claim.runs, [claim.measures]) for claim in claims]
        runs = dict.fromkeys(run for every, _ in pairs for run in every)
        return tuple(runs), tuple(dict.fromkeys(path for _, found in pairs for path in found))

    def variance_comparison(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Runs with several trainings, and their results in everything that tables show."""
        replicated = [run for run in self._asked if len(self.replicas(run)) > 1]
        found: dict[str, None] = {}
        for column in (column for table in self.tables.values() for column in table.columns):
            asked = {measure.benchmark for measure in column.measures}
            own = [run for run in replicated if asked <= self._asked[run]]
            found |= dict.fromkeys(self.results(own, column.measures))
        return tuple(replicated), tuple(found)

    def figure_results(self, name: str) -> tuple[str, ...]:
        """Results that a figure is drawn from."""
        return self.results(*self.figures[name].uses())

    def figure_stores(self, name: str) -> tuple[tuple[str, str, str], ...]:
        """LLM, bundle and caption kind of every store that a figure is drawn from."""
        drawn = self.figures[name].stores()
        return tuple(dict.fromkeys((llm, self.bundle(data), kind) for llm, data, kind in drawn))
