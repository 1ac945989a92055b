"""The study: every key of its YAML, checked before any job starts.

A *study* names everything to be computed. `Study` is its schema, `load` turns YAML into it or
says in one line per mistake what is wrong and which values are known.
"""

import random
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, TypeGuard

from pydantic import Field, model_validator

from flame.runtime.errors import known
from flame.study.schema.benchmarks import FEWSHOT, Benchmark, Bootstrap, Overhead, task_names
from flame.study.schema.data import Captioner, Dataset, PublishedCaptions
from flame.study.schema.figures import (
    CaptionsFigure,
    ExamplesFigure,
    Figure,
    MaskFigure,
    OverheadFigure,
    PromptsFigure,
    RadarFigure,
    WordsFigure,
)
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
)
from flame.study.schema.section import Section
from flame.study.schema.tables import AppendixTable, Claim, Measure, Table
from flame.study.settings import (
    VERSION,
    AppendixSettings,
    CaptionSettings,
    CaptionsSettings,
    ClaimsSettings,
    ClipTraining,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    FewShotSettings,
    FigureSettings,
    FlameTraining,
    LongClipTraining,
    OverheadSettings,
    PretrainedTower,
    Question,
    Reading,
    ReleasedTower,
    TableSettings,
    Training,
)

# Sections whose names become parts of paths.
IN_PATHS = (
    "datasets",
    "captioners",
    "llms",
    "facets",
    "prompts",
    "runs",
    "tables",
    "appendix",
    "figures",
)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class Study(Section):
    """Everything that is to be computed."""

    study: str = Field(description="name of the study, shown in every table")
    seed: int = Field(default=0, description="of data, and of draws of facets")
    seeds: tuple[int, ...] | None = Field(
        default=None, description="of trainings, each run once for each; null: the seed above"
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
    bootstrap: Bootstrap = Bootstrap()
    tables: dict[str, Table]
    appendix: dict[str, AppendixTable] = Field(default={})
    figures: dict[str, Figure] = Field(default={})
    claims: dict[str, Claim] = Field(default={})
    overhead: Overhead | None = None
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
        yield from self._name_mistakes()
        yield from self._prompt_mistakes()
        for name, dataset in self.datasets.items():
            if dataset.captioner is not None and dataset.captioner not in self.captioners:
                captioners = known(dataset.captioner, self.captioners)
                yield f"datasets.{name}.captioner", f"unknown captioner {captioners}"
        for name, run in self.runs.items():
            yield from self._run_mistakes(f"runs.{name}", run)
        for name, benchmark in self.benchmarks.items():
            yield from self._benchmark_mistakes(f"benchmarks.{name}", benchmark)
        for path, run_names, measures in self._uses():
            for name in run_names:
                if name not in self.runs:
                    yield path, f"unknown run {known(name, self.runs)}"
            for measure in measures:
                if measure.benchmark not in self.benchmarks:
                    benchmarks = known(measure.benchmark, self.benchmarks)
                    yield path, f"unknown benchmark {benchmarks}"
        yield from self._other_mistakes()

    def _uses(self) -> Iterator[tuple[str, Iterable[str], Iterable[Measure]]]:
        """Path of every block that asks for metrics; the runs and the measures it names."""
        for name, table in self.tables.items():
            for i, row in enumerate(table.rows):
                yield f"tables.{name}.rows.{i}.run", filter(None, (row.run, row.gain_over)), ()
            for i, column in enumerate(table.columns):
                yield f"tables.{name}.columns.{i}", (), column.measures
        for name, claim in self.claims.items():
            yield f"claims.{name}", filter(None, (claim.better, claim.worse)), claim.measures
        for name, figure in self.figures.items():
            yield f"figures.{name}", *self._figure_use(figure)

    def _figure_use(self, figure: Figure) -> tuple[tuple[str, ...], tuple[Measure, ...]]:
        """Runs and measures of a figure."""
        match figure:
            case PromptsFigure():
                runs = tuple(run for draws in figure.runs.values() for run in draws)
                return runs, tuple(m for column in figure.columns for m in column.measures)
            case RadarFigure():
                names, metrics = figure.languages.values(), figure.metrics
                measures = (Measure(benchmark=b, metric=m) for b in names for m in metrics)
                return tuple(figure.runs.values()), tuple(measures)
            case ExamplesFigure():
                measure = Measure(benchmark=figure.benchmark, metric="t2i_r@1")
                return tuple(figure.runs.values()), (measure,)
            case WordsFigure():
                return (figure.run,), (Measure(benchmark=figure.benchmark, metric=""),)
        return (), ()

    def _name_mistakes(self) -> Iterator[tuple[str, str]]:
        """Names that become parts of paths, and so of commands."""
        asked_alone = [n for n, benchmark in self.benchmarks.items() if benchmark.task == "fewshot"]
        for section, names in {
            **{section: list(getattr(self, section)) for section in IN_PATHS},
            "benchmarks": asked_alone,
            "datasets.*.bundle": [d.bundle for d in self.datasets.values() if d.bundle],
            "prompts.*.captions": [kind for p in self.prompts.values() for kind in p.captions],
        }.items():
            for name in names:
                if not NAME.fullmatch(name):
                    yield (
                        section,
                        f"{name!r} becomes part of a path: a name begins with a letter, a digit or "
                        "_, and has only these, '.', '+' and '-'",
                    )

    def _other_mistakes(self) -> Iterator[tuple[str, str]]:
        for name, table in self.appendix.items():
            if table.recipe is not None and table.recipe not in self.recipes:
                recipes = known(table.recipe, self.recipes)
                yield f"appendix.{name}.recipe", f"unknown recipe {recipes}"
        for name, claim in self.claims.items():
            if claim.table is not None and claim.table not in self.tables:
                yield f"claims.{name}.table", f"unknown table {known(claim.table, self.tables)}"
        asked = any(claim.ratio for claim in self.claims.values()) or any(
            isinstance(figure, OverheadFigure) for figure in self.figures.values()
        )
        if asked and self.overhead is None:
            yield "overhead", "is missing, but a claim or a figure asks for it"
        if self.overhead is not None:
            for key, kind in (("run", FlameRun), ("baseline", ClipRun)):
                name = getattr(self.overhead, key)
                if not isinstance(self.runs.get(name), kind):
                    fitting = [n for n, run in self.runs.items() if isinstance(run, kind)]
                    yield f"overhead.{key}", f"no {kind.__name__} {known(name, fitting)}"
        for name, figure in self.figures.items():
            if isinstance(figure, MaskFigure):
                yield from self._mask_mistakes(f"figures.{name}", figure)
            if isinstance(figure, CaptionsFigure):
                yield from self._captions_mistakes(f"figures.{name}", figure)

    def _mask_mistakes(self, path: str, figure: MaskFigure) -> Iterator[tuple[str, str]]:
        if figure.llm not in self.llms:
            yield f"{path}.llm", f"unknown llm {known(figure.llm, self.llms)}"
        if figure.prompt not in self.prompts:
            yield f"{path}.prompt", f"unknown prompt {known(figure.prompt, self.prompts)}"
        for facet in figure.facets:
            if facet not in self.facets:
                yield f"{path}.facets", f"unknown facet {known(facet, self.facets)}"

    def _captions_mistakes(self, path: str, figure: CaptionsFigure) -> Iterator[tuple[str, str]]:
        if figure.llm not in self.llms:
            yield f"{path}.llm", f"unknown llm {known(figure.llm, self.llms)}"
        for kind in figure.kinds:
            if kind not in self._prompt_of_kind:
                kinds = known(kind, self._prompt_of_kind)
                yield f"{path}.kinds", f"no prompt embeds captions of kind {kinds}"
        unknown = [name for name in figure.datasets.values() if name not in self.datasets]
        for name in unknown:
            yield f"{path}.datasets", f"unknown dataset {known(name, self.datasets)}"
        sets = [self.datasets[name] for name in figure.datasets.values() if name not in unknown]
        # Keys of other images may well be the same: 000000000 is the first one of every split.
        if len({(d.source, str(d.options.get("split"))) for d in sets}) > 1:
            first, second = figure.datasets.values()
            yield f"{path}.datasets", f"{first!r} and {second!r} are not of one source and split"

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
            ("text_tower", self.text_towers),
            ("recipe", self.recipes),
        ):
            value = getattr(run, key, None)
            if value is not None and value not in table:
                yield f"{path}.{key}", f"unknown {key} {known(value, table)}"
        if isinstance(run, LongClipRun) and not isinstance(self.runs.get(run.base), ClipRun):
            clips = [name for name, other in self.runs.items() if isinstance(other, ClipRun)]
            yield f"{path}.base", f"no CLIP run {known(run.base, clips)}"
        if isinstance(run, FlameRun):
            yield from self._target_mistakes(path, run)

    def _target_mistakes(self, path: str, run: FlameRun) -> Iterator[tuple[str, str]]:
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
        if benchmark.train is not None and benchmark.train not in self.datasets:
            yield f"{path}.train", f"unknown dataset {known(benchmark.train, self.datasets)}"
        for key in ("captions", "negatives"):
            kind = getattr(benchmark, key)
            if kind is not None and kind not in self._prompt_of_kind:
                kinds = known(kind, self._prompt_of_kind)
                yield f"{path}.{key}", f"no prompt embeds captions of kind {kinds}"
                return
        if benchmark.captions is None:
            return
        embedded = self.prompts[self._prompt_of_kind[benchmark.captions]].facets
        for facet in benchmark.facets if isinstance(benchmark.facets, tuple) else ():
            if facet not in embedded:
                yield f"{path}.facets", f"facet not embedded: {known(facet, embedded)}"

    @cached_property
    def _prompt_of_kind(self) -> dict[str, str]:
        return {kind: name for name, prompt in self.prompts.items() for kind in prompt.captions}

    # What follows resolves names; rules and their functions of wildcards ask only these.

    @cached_property
    def trainings(self) -> dict[str, tuple[Run, int]]:
        """Name of every training -> its run and its seed."""
        return {
            name: (run, seed)
            for key, run in self.runs.items()
            for name, seed in zip(self.replicas(key), self._seeds(run), strict=True)
        }

    def replicas(self, run: str) -> tuple[str, ...]:
        """Trainings of a run, one a seed: the first has its name, the others `<run>.seed<n>`."""
        others = self._seeds(self.runs[run])[1:]
        return run, *(f"{run}.seed{seed}" for seed in others)

    def _seeds(self, run: Run) -> tuple[int, ...]:
        if not self._is_trained(run):
            return (self.seed,)
        return run.seeds or self.seeds or (self.seed,)

    @staticmethod
    def _is_trained(run: Run) -> TypeGuard[FlameRun | ClipRun | LongClipRun]:
        return not (isinstance(run, PretrainedRun) or (isinstance(run, FlameRun) and run.weights))

    def trained(self, training: str) -> bool:
        """Whether a tower is trained here, and not taken from others."""
        return self._is_trained(self.run(training))

    def run(self, training: str) -> Run:
        """The run of a training."""
        return self.trainings[training][0]

    def flame_run(self, training: str) -> FlameRun:
        """The run of a training on embeddings."""
        run = self.run(training)
        assert isinstance(run, FlameRun)
        return run

    def base(self, training: str) -> str | None:
        """Training that a training starts from, with the same seed where that is trained."""
        run, seed = self.trainings[training]
        if not isinstance(run, LongClipRun):
            return None
        replicas = zip(self.replicas(run.base), self._seeds(self.runs[run.base]), strict=True)
        return next((name for name, of in replicas if of == seed), run.base)

    def dataset_of(self, training: str) -> str:
        """Data set that a training learns from."""
        run = self.run(training)
        if isinstance(run, LongClipRun):
            return run.dataset or self.dataset_of(run.base)
        assert not isinstance(run, PretrainedRun)
        return run.dataset

    def baseline_kinds(self, training: str) -> tuple[str, ...]:
        """Caption kinds that a training reads as words; none for FLAME, which reads vectors."""
        match self.run(training):
            case ClipRun(captions=kind):
                return (kind,)
            case LongClipRun(long=long, short=short):
                return long, short
        return ()

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
        chosen_run = self.flame_run(run)
        for kind, choice in chosen_run.targets.items():
            prompt = self.prompt_of(kind)
            if choice == "default":
                chosen: Iterable[str] = prompt.default
            elif isinstance(choice, int):
                another = f"/{chosen_run.draw}" if chosen_run.draw else ""
                draw = random.Random(f"{self.seed}/{kind}/{choice}{another}")
                chosen = draw.sample(prompt.facets, choice)
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
        for name, run in self.runs.items():
            if not isinstance(run, FlameRun) or run.llm != llm:
                continue
            trained_here = run.dataset is not None and self.bundle(run.dataset) == bundle
            if kind in run.targets and trained_here:
                used.update(self.targets(name)[kind])
            for question in self.questions(name, bundle):
                if kind in (question.captions, question.negatives):
                    used.update(question.facets)
        if any((llm, bundle, kind) in self.figure_stores(name) for name in self.figures):
            used.update(prompt.default)
        return tuple(facet for facet in prompt.facets if facet in used)

    def parts(self, bundle: str, kind: str) -> int:
        """Number of embedding jobs that the captions of a kind are cut into."""
        return max(
            dataset.parts.get(kind, 1)
            for name, dataset in self.datasets.items()
            if self.bundle(name) == bundle
        )

    def bundle_datasets(self, bundle: str, kind: str) -> tuple[str, ...]:
        """Data sets of a bundle whose captions of a kind some run, benchmark or figure uses."""
        flame = [r for r in self.runs.values() if isinstance(r, FlameRun) and not r.weights]
        used = {run.dataset for run in flame if kind in run.targets}
        asked = [b for b in self.benchmarks.values() if b.task != FEWSHOT]
        used |= {b.dataset for b in asked if kind in (b.captions, b.negatives)}
        compared = [f for f in self.figures.values() if isinstance(f, CaptionsFigure)]
        used |= {name for f in compared if kind in f.kinds for name in f.datasets.values()}
        return tuple(n for n in self.datasets if n in used and self.bundle(n) == bundle)

    def questions(self, training: str, bundle: str) -> tuple[Question, ...]:
        """Benchmarks of a bundle, as asked of a training."""
        flame = isinstance(self.run(training), FlameRun)
        return tuple(
            Question(
                benchmark=name,
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
            if benchmark.task != FEWSHOT and self.bundle(benchmark.dataset) == bundle
        )

    def _question_facets(self, training: str, benchmark: Benchmark) -> tuple[str, ...]:
        if benchmark.captions is None:
            return ()
        prompt = self.prompt_of(benchmark.captions)
        if isinstance(benchmark.facets, tuple):
            return benchmark.facets
        trained = self.targets(training).get(benchmark.center or benchmark.captions)
        return trained if benchmark.facets == "trained" and trained else prompt.default

    def results(self, runs: Iterable[str], measures: Iterable[Measure]) -> tuple[str, ...]:
        """Results that hold some metrics, as paths below `results` without their extensions."""
        found: dict[str, None] = {}
        benchmarks = dict.fromkeys(measure.benchmark for measure in measures)
        for training in (name for run in dict.fromkeys(runs) for name in self.replicas(run)):
            for name in benchmarks:
                benchmark = self.benchmarks[name]
                if benchmark.task == FEWSHOT:
                    found[f"fewshot/{training}/{name}"] = None
                else:
                    found[f"evaluate/{training}/{self.bundle(benchmark.dataset)}"] = None
        return tuple(found)

    def table_results(self, name: str) -> tuple[str, ...]:
        """Results that a table is made of, with those of the claims that stand under it."""
        table = self.tables[name]
        found = dict.fromkeys(self.results(table.runs, table.measures))
        found |= dict.fromkeys(self.claim_results(self._claims_under(name)))
        return tuple(found)

    def claim_results(self, claims: Iterable[Claim]) -> tuple[str, ...]:
        """Results that some claims are held against."""
        found: dict[str, None] = {}
        for claim in claims:
            runs = [run for run in (claim.better, claim.worse) if run]
            found |= dict.fromkeys(self.results(runs, claim.measures))
        return tuple(found)

    def figure_results(self, name: str) -> tuple[str, ...]:
        """Results that a figure is made of."""
        return self.results(*self._figure_use(self.figures[name]))

    def figure_stores(self, name: str) -> tuple[tuple[str, str, str], ...]:
        """LLM, bundle and caption kind of every store that a figure is drawn from."""
        figure = self.figures[name]
        if not isinstance(figure, CaptionsFigure):
            return ()
        bundles = dict.fromkeys(map(self.bundle, figure.datasets.values()))
        return tuple((figure.llm, bundle, kind) for kind in figure.kinds for bundle in bundles)

    def _claims_under(self, table: str) -> tuple[Claim, ...]:
        return tuple(c for c in self.claims.values() if c.table == table and c.untested is None)

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
            "embedding": self.embedding.model_dump(mode="json", exclude={"facets"}),
            "words": [self._words(*facet) for facet in dict.fromkeys(facets)],
            "datasets": {name: self._content_of(name) for name in datasets},
            "parts": {f"{bundle}/{kind}": self.parts(bundle, kind) for bundle, kind in pairs},
            "seed": self.seed,
            "versions": [VERSION["download"], VERSION["embed"]],
        }

    def _words(self, kind: str, facet: str) -> list[str]:
        prompt = self.prompt_of(kind)
        return [kind, facet, *prompt.prefix, prompt.suffix(self.facets[facet].text)]

    def _content_of(self, dataset: str) -> dict[str, Any]:
        """All that decides the images and captions of a data set."""
        chosen = self.datasets[dataset]
        content = chosen.model_dump(mode="json", include={"source", "options"})
        if chosen.captioner is not None:
            captions = self.captions_settings(chosen.captioner, dataset)
            content["captions"] = captions.model_dump(mode="json")
        return content

    def captioner_of(self, dataset: str, kind: str) -> str | None:
        """Who writes a data set's captions of a kind; nobody if they are its own."""
        name = self.datasets[dataset].captioner
        if name is None:
            return None
        captioner = self.captioners[name]
        if isinstance(captioner, PublishedCaptions):
            return name if kind in captioner.files else None
        return name if kind in captioner.prompts else None

    def caption_settings(self, captioner: str, dataset: str, part: int) -> CaptionSettings:
        """Settings of one captioning job."""
        return CaptionSettings(
            dataset=dataset,
            part=part,
            parts=self.caption_parts(captioner, dataset),
            captioner=self.captioners[captioner],
            version=VERSION["caption"],
        )

    def caption_parts(self, captioner: str, dataset: str) -> int:
        """Number of jobs that write the captions of a data set."""
        published = isinstance(self.captioners[captioner], PublishedCaptions)
        return 1 if published else self.datasets[dataset].captioner_parts

    def captions_settings(self, captioner: str, dataset: str) -> CaptionsSettings:
        """Settings of the job that joins the captions of a data set."""
        return CaptionsSettings(
            dataset=dataset,
            captioner=self.captioners[captioner],
            max_skipped=self.max_skipped,
            version=VERSION["caption"],
        )

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
            cleanup=self.embedding.cleanup,
            storage=self.embedding.storage,
            prefix=prompt.prefix,
            facets={
                name: prompt.suffix(self.facets[name].text)
                for name in self.embedded_facets(llm, bundle, kind)
            },
            version=VERSION["embed"],
        )

    def train_settings(self, training: str) -> Training:
        """Settings of one training."""
        run, seed = self.trainings[training]
        assert not isinstance(run, PretrainedRun)
        shared: dict[str, Any] = {
            "run": training,
            "seed": seed,
            "dataset": self.dataset_of(training),
            "recipe": self.recipes[run.recipe],
            "max_skipped": self.max_skipped,
            "version": VERSION["train"],
        }
        if isinstance(run, FlameRun):
            backbone, targets = self.backbones[run.backbone], self.targets(training)
            return FlameTraining(backbone=backbone, targets=targets, **shared)
        clip = run if isinstance(run, ClipRun) else self.runs[run.base]
        assert isinstance(clip, ClipRun)
        shared |= {
            "method": run.method,
            "backbone": self.backbones[clip.backbone],
            "text_tower": self.text_towers[clip.text_tower],
        }
        if isinstance(run, ClipRun):
            return ClipTraining(captions=run.captions, **shared)
        own = run.model_dump(exclude={"method", "base", "dataset", "recipe", "seeds"})
        return LongClipTraining(**own, **shared)

    def tower_settings(self, training: str) -> PretrainedTower | ReleasedTower:
        """Settings of a tower that is not trained here."""
        run = self.run(training)
        if isinstance(run, PretrainedRun):
            return PretrainedTower(run=training, **run.model_dump(), version=VERSION["download"])
        trained = self.train_settings(training)
        assert isinstance(run, FlameRun)
        assert isinstance(trained, FlameTraining)
        assert run.weights is not None
        return ReleasedTower(
            method="released",
            training=trained,
            weights=run.weights,
            version=VERSION["download"],
        )

    def train_origin(self, training: str) -> dict[str, Any]:
        """What is behind the files of a training, down to the words of its facets."""
        run = self.run(training)
        if not self._is_trained(run):
            return self.tower_settings(training).model_dump(mode="json")
        dataset = self.dataset_of(training)
        if isinstance(run, FlameRun):
            facets = [(kind, name) for kind, ns in self.targets(training).items() for name in ns]
            return self.origin(run.llm, facets, [dataset])
        base = self.base(training)
        return {
            "datasets": {dataset: self._content_of(dataset)},
            "seed": self.seed,
            "versions": [VERSION["download"]],
            "base": base and [self.train_settings(base).model_dump(), self.train_origin(base)],
        }

    def evaluate_settings(self, training: str, bundle: str) -> EvaluateSettings:
        """Settings of one evaluation."""
        return EvaluateSettings(
            run=training,
            questions=self.questions(training, bundle),
            bootstrap=self.bootstrap,
            version=VERSION["evaluate"],
        )

    def evaluate_origin(self, training: str, bundle: str) -> list[Any]:
        """What is behind the files of an evaluation: those of the tower, and its own."""
        run, asked = self.run(training), self.questions(training, bundle)
        names = [name for q in asked for name in (q.dataset, q.train) if name]
        own: dict[str, Any] = {name: self._content_of(name) for name in names}
        if isinstance(run, FlameRun):
            kinds = [(q, kind) for q in asked for kind in (q.captions, q.negatives) if kind]
            facets = [(kind, facet) for q, kind in kinds for facet in q.facets]
            own = self.origin(run.llm, facets, dict.fromkeys(names))
        origin = self.train_origin(training)
        if not self._is_trained(run):
            return [origin, own]
        return [self.train_settings(training).model_dump(mode="json"), origin, own]

    def export_settings(self, training: str) -> ExportSettings:
        """Settings of a run as it is given away; texts are read as its benchmarks read them."""
        run = self.run(training)
        if not isinstance(run, FlameRun):
            raise ValueError(f"run {training!r} is not FLAME, and only FLAME is exported")
        read = {kind: (facets, kind) for kind, facets in self.targets(training).items()}
        for bundle in dict.fromkeys(map(self.bundle, self.datasets)):
            for question in self.questions(training, bundle):
                if question.captions:
                    read.setdefault(question.captions, (question.facets, str(question.center)))
        llm, embedding = self.llms[run.llm], self.embedding
        return ExportSettings(
            run=training,
            checkpoint=llm.checkpoint,
            reset=llm.reset,
            layer=llm.layer,
            final_norm=llm.final_norm,
            positions=embedding.positions,
            max_caption_tokens=embedding.max_caption_tokens,
            cleanup=embedding.cleanup,
            kinds={
                kind: Reading(
                    prefix=self.prompt_of(kind).prefix,
                    facets={
                        name: self.prompt_of(kind).suffix(self.facets[name].text) for name in facets
                    },
                    center=center,
                )
                for kind, (facets, center) in read.items()
            },
            version=VERSION["export"],
        )

    def export_results(self, training: str) -> tuple[str, ...]:
        """Results of a run that tables, figures and claims ask for."""
        found = [result for name in self.tables for result in self.table_results(name)]
        found += [result for name in self.figures for result in self.figure_results(name)]
        wanted = f"evaluate/{training}/"
        return tuple(dict.fromkeys(result for result in found if result.startswith(wanted)))

    def fewshot_settings(self, training: str, benchmark: str) -> FewShotSettings:
        """Settings of one few-shot job."""
        chosen = self.benchmarks[benchmark]
        assert chosen.fewshot is not None
        assert chosen.captions is not None
        return FewShotSettings(
            run=training,
            benchmark=benchmark,
            dataset=chosen.dataset,
            captions=chosen.captions,
            fewshot=chosen.fewshot,
            final_norm=self.llms[self.flame_run(training).llm].final_norm,
            seed=self.seed,
            bootstrap=self.bootstrap,
            version=VERSION["fewshot"],
        )

    def overhead_settings(self) -> OverheadSettings:
        """Settings of what is timed."""
        assert self.overhead is not None
        flame = self.train_settings(self.overhead.run)
        clip = self.train_settings(self.overhead.baseline)
        assert isinstance(flame, FlameTraining)
        assert isinstance(clip, ClipTraining)
        llm, bundle = self.flame_run(self.overhead.run).llm, self.bundle(flame.dataset)
        return OverheadSettings(
            overhead=self.overhead,
            flame=flame,
            clip=clip,
            embedding=self.embed_settings(llm, bundle, "long", 0),
            version=VERSION["overhead"],
        )

    def table_settings(self, name: str) -> TableSettings:
        """Settings of one table."""
        table, claims = self.tables[name], self._claims_under(name)
        return TableSettings(
            study=self.study,
            name=name,
            table=table,
            claims=claims,
            version=VERSION["table"],
            **self._named(claims, table.runs, table.measures),
        )

    def claims_settings(self) -> ClaimsSettings:
        """Settings of the list of claims."""
        claims = tuple(self.claims.values())
        return ClaimsSettings(
            study=self.study,
            claims=claims,
            version=VERSION["table"],
            **self._named(claims, (), ()),
        )

    def appendix_settings(self, name: str) -> AppendixSettings:
        """Settings of a table of the study itself."""
        table = self.appendix[name]
        backbones = {
            run.backbone: None
            for run in self.runs.values()
            if isinstance(run, FlameRun | ClipRun) and run.recipe == table.recipe
        }
        return AppendixSettings(
            study=self.study,
            name=name,
            table=table,
            recipe=self.recipes[table.recipe] if table.recipe else None,
            backbones=tuple(backbones),
            facets=self.facets,
            prompts=self.prompts,
            version=VERSION["table"],
        )

    def figure_settings(self, name: str) -> FigureSettings:
        """Settings of one figure."""
        figure = self.figures[name]
        prefix, facets, averaged = None, {}, {}
        if isinstance(figure, MaskFigure):
            prompt = self.prompts[figure.prompt]
            prefix = prompt.prefix
            facets = {name: prompt.suffix(self.facets[name].text) for name in figure.facets}
        if isinstance(figure, CaptionsFigure):
            averaged = {kind: self.prompt_of(kind).default for kind in figure.kinds}
        return FigureSettings(
            study=self.study,
            name=name,
            figure=figure,
            prefix=prefix,
            facets=facets,
            averaged=averaged,
            version=VERSION["figure"],
            **self._named((), *self._figure_use(figure)),
        )

    def _named(
        self, claims: Iterable[Claim], runs: Iterable[str], measures: Iterable[Measure]
    ) -> dict[str, Any]:
        """What stands behind the names of runs and benchmarks."""
        claims = list(claims)
        runs = [*runs, *(r for c in claims for r in (c.better, c.worse) if r)]
        benchmarks = [m.benchmark for m in [*measures, *(m for c in claims for m in c.measures)]]
        return {
            "datasets": {b: self.benchmarks[b].dataset for b in dict.fromkeys(benchmarks)},
            "runs": {run: self.replicas(run) for run in dict.fromkeys(runs)},
            "bootstrap": self.bootstrap,
        }
