"""Everything that a study, or some of its tables and figures, will run."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flame.runtime.errors import known
from flame.study import files
from flame.study.jobs import JOBS, Planned, captioners_by_vllm, closure, training_bundles
from flame.study.study import Study

VARIANTS = ("embed_training", "caption_by_vllm")  # rules that inherit from `embed` and `caption`
ROWS_OF_IMAGE = 5  # short captions per benchmark image
TEXT_OPTIONS = ("language", "kind")  # of a data set, which decide its texts and not its images
CLASS_TEXTS = 20_000  # per classification benchmark: classes x templates


@dataclass(frozen=True)
class Store:
    """Embeddings by one LLM of the captions of one kind in a bundle."""

    llm: str
    bundle: str
    kind: str


class Extent:
    """All jobs behind some tables and figures, and what they have to do with each other."""

    def __init__(self, study: Study, only: Sequence[str] = ()) -> None:
        """Look up the names.

        Args:
            study: the study.
            only: names of tables and figures, or `claims`; by default all of them.

        Raises:
            ValueError: an unknown name.
        """
        self.study = study
        names = [*study.tables, *study.figures, *study.appendix]
        names += ["claims"] if study.claims else []
        for name in only:
            if name not in names:
                raise ValueError(f"no table or figure {known(name, names)}")
        self.only = tuple(only) or tuple(names)

    @cached_property
    def planned(self) -> list[Planned]:
        """All jobs, as Snakemake plans them in an empty folder."""
        study, targets = self.study, []
        for name in self.only:
            rule = next((r for r, names in self._named.items() if name in names), "claims")
            targets.append(files.output(rule, **{rule: name}))
        return list(closure(study, targets))

    @property
    def _named(self) -> dict[str, Container[str]]:
        """Rule -> names of its targets."""
        study = self.study
        return {"table": study.tables, "figure": study.figures, "appendix": study.appendix}

    def _of(self, *rules: str) -> list[Mapping[str, str]]:
        """Wildcards of the jobs of some rules."""
        return [job.wildcards for job in self.planned if job.rule in rules]

    @cached_property
    def evaluations(self) -> list[tuple[str, str]]:
        """Training and bundle of every evaluation."""
        return [(job["run"], job["bundle"]) for job in self._of("evaluate")]

    @cached_property
    def towers(self) -> list[str]:
        """Trained and downloaded towers, in the order of the study."""
        found = {job["run"] for job in self._of("train", "download_tower")}
        return [name for name in self.study.trainings if name in found]

    @cached_property
    def stores(self) -> list[Store]:
        """Embeddings that trainings, results and figures read."""
        embedded = self._of("embed")
        found = {Store(job["llm"], job["bundle"], job["kind"]) for job in embedded}
        return sorted(found, key=self._order)

    def _order(self, store: Store) -> tuple[int, int, str]:
        bundles = list(dict.fromkeys(map(self.study.bundle, self.study.datasets)))
        return [*self.study.llms].index(store.llm), bundles.index(store.bundle), store.kind

    @cached_property
    def llms(self) -> list[str]:
        """LLMs that captions are embedded with, or whose vocabulary is used."""
        found = {job["llm"] for job in self._of("download_llm")}
        return [name for name in self.study.llms if name in found]

    @cached_property
    def datasets(self) -> list[str]:
        """Data sets whose images or captions are read."""
        found = {job["dataset"] for job in self._of("download_dataset")}
        return [name for name in self.study.datasets if name in found]

    @cached_property
    def captioned(self) -> dict[str, str]:
        """Data set -> captioner, for data sets whose generated captions are read."""
        found = {job["dataset"]: job["captioner"] for job in self._of("captions")}
        return {name: found[name] for name in self.study.datasets if name in found}

    def facets(self, store: Store) -> tuple[str, ...]:
        """Facets of a store."""
        return self.study.embedded_facets(store.llm, store.bundle, store.kind)

    def jobs(self) -> dict[str, int]:
        """Jobs of every rule, as `snakemake -n` counts them in an empty folder."""
        training, vllm = training_bundles(self.study), captioners_by_vllm(self.study)
        found: Counter[str] = Counter()
        for rule, wildcards, _ in self.planned:
            if rule == "embed" and wildcards["bundle"] in training:
                rule = "embed_training"
            if rule == "caption" and wildcards["captioner"] in vllm:
                rule = "caption_by_vllm"
            found[rule] += 1
        return {rule: found[rule] for rule in (*JOBS, *VARIANTS) if found[rule]}

    def rows(self, store: Store) -> int:
        """Captions in a store: a long one per image, and a short one of a training set."""
        study, rows = self.study, 0
        learned = {study.dataset_of(name) for name in filter(study.trained, study.trainings)}
        for name in study.bundle_datasets(store.bundle, store.kind):
            written = study.captioner_of(name, store.kind) is not None
            is_one = written or name in learned or store.kind == "long"
            images = study.datasets[name].images
            is_class = store.kind == "class"
            rows += images if is_one else CLASS_TEXTS if is_class else ROWS_OF_IMAGE * images
        return rows

    def images(self, run: str, bundle: str) -> int:
        """Images that an evaluation reads: sets that differ in texts only share theirs."""
        sets = {}
        for question in self.study.questions(run, bundle):
            for name in filter(None, (question.dataset, question.train)):
                chosen = self.study.datasets[name]
                options = {k: v for k, v in chosen.options.items() if k not in TEXT_OPTIONS}
                sets[chosen.source, str(sorted(options.items()))] = chosen.images
        return sum(sets.values())
