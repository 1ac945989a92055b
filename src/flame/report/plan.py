"""Estimate of what a study takes: jobs, GPU-hours, disk, memory, access."""

import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import get_token

from flame.data.datasets import module
from flame.report import costs
from flame.report.markdown import markdown_table
from flame.runtime.errors import known
from flame.study import files, stages
from flame.study.jobs import JOBS, Planned, captioners_by_vllm, closure, training_bundles
from flame.study.schema.data import PublishedCaptions
from flame.study.schema.llms import HubCheckpoint
from flame.study.schema.runs import FlameRun
from flame.study.study import Study

VARIANTS = ("embed_training", "caption_by_vllm")  # rules that inherit from `embed` and `caption`
BYTES_OF_IMAGE = 60_000  # if the download size is not published
ROWS_OF_IMAGE = 5  # captions per benchmark image
CLASS_TEXTS = 20_000  # per classification benchmark: classes x templates
MEMORY = 1.1  # GPU memory of an embedding job, relative to the weights of its LLM


@dataclass(frozen=True)
class Assumptions:
    """What GPU-hours are estimated from; each is a command-line argument.

    Args:
        peak: TFLOP/s of one GPU in bfloat16; 989 is an H100.
        embed_use: utilisation (MFU) of embedding; expect 0.45 to 0.55.
        train_use: utilisation (MFU) of training; published runs reach 0.13 to 0.40.
        captions_per_second: images that an 8B MLLM captions on one GPU, counting both captions
            of an image as one; 4 to 10 have been reported.
        images_per_second: images that an evaluation decodes, resizes and encodes.
    """

    peak: float = 989.0
    embed_use: float = 0.5
    train_use: float = 0.3
    captions_per_second: float = 6.0
    images_per_second: float = 800.0


@dataclass(frozen=True)
class Store:
    """Embeddings by one LLM of the captions of one kind in a bundle."""

    llm: str
    bundle: str
    kind: str


class Plan:
    """Everything that a study, or some of its tables and figures, will run."""

    def __init__(self, study: Study, only: Sequence[str], assumptions: Assumptions) -> None:
        self.study, self.assumptions = study, assumptions
        names = [*study.tables, *study.figures, *study.appendix]
        for name in only:
            if name not in names:
                raise ValueError(f"no table or figure {known(name, names)}")
        self.only = tuple(only) or (*names, *(["claims"] if study.claims else []))

    # --- which jobs -------------------------------------------------------------------------

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

    # --- what they take ---------------------------------------------------------------------

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

    def shape(self, llm: str) -> costs.Shape | None:
        """Sizes of an LLM: from its files if they are here, else as published."""
        checkpoint = self.study.llms[llm].checkpoint
        there = costs.shape_of(Path("resources/llms") / llm)
        if there is None and isinstance(checkpoint, HubCheckpoint):
            return costs.SHAPES.get(checkpoint.id)
        return there

    def rows(self, store: Store) -> int:
        """Captions in a store: one per image for training sets and captioned sets, else a few."""
        rows = 0
        for name in self.study.bundle_datasets(store.bundle, store.kind):
            images = self.study.datasets[name].images
            is_one = self.study.captioner_of(name, store.kind) is not None or any(
                self.study.trained(t) and self.study.dataset_of(t) == name for t in self.towers
            )
            is_class = store.kind == "class"
            rows += images if is_one else CLASS_TEXTS if is_class else ROWS_OF_IMAGE * images
        return rows

    def _hours(self, flop: float, use: float) -> float:
        return flop / (self.assumptions.peak * 1e12 * use) / 3600

    # --- the document -----------------------------------------------------------------------

    def document(self) -> str:
        """The whole estimate as Markdown."""
        self.totals: dict[str, list[float]] = {}
        parts = {
            "Jobs": self._jobs(),
            "Data": self._data(),
            "Models": self._models(),
            "Captions": self._captions(),
            "Embeddings": self._embeddings(),
            "Trainings": self._trainings(),
            "Evaluations": self._evaluations(),
            "Total": self._total(),
            "Assumptions": self._assumptions(),
        }
        head = f"# Estimate for study {self.study.study!r}\n\n{', '.join(self.only)}.\n"
        return head + "".join(f"\n## {title}\n\n{text}" for title, text in parts.items() if text)

    def _add(self, stage: str, hours: float, disk: float) -> None:
        total = self.totals.setdefault(stage, [0.0, 0.0])
        total[0] += hours
        total[1] += disk

    def _jobs(self) -> str:
        jobs = self.jobs()
        lines = [[rule, f"{count:,}"] for rule, count in jobs.items()]
        return _table(["rule", "jobs"], [*lines, ["total", f"{sum(jobs.values()):,}"]])

    def _data(self) -> str:
        """One line per module, as several data sets may come from one download."""
        sources: dict[str, list[str]] = {}
        for name in self.datasets:
            sources.setdefault(self.study.datasets[name].source, []).append(name)
        lines = []
        for source, names in sources.items():
            card = module(source).CARD
            splits: dict[str, int] = {}
            for name in names:
                chosen = self.study.datasets[name]
                split = str(chosen.options.get("split"))
                splits[split] = max(chosen.images, splits.get(split, 0))
            images = sum(splits.values())
            is_told = card.bytes is not None
            size = card.bytes if card.bytes is not None else BYTES_OF_IMAGE * images
            # The download stays, and the images are written to our tar shards as well.
            self._add("data", 0, 2 * size)
            there = sum((Path("resources/datasets") / name).exists() for name in names)
            about = "" if is_told else "about "
            lines.append(
                [
                    card.title,
                    f"{images:,}",
                    about + _bytes(size),
                    f"{there} of {len(names)}",
                    card.licence,
                    card.needs,
                ]
            )
        return _table(["set", "images", "download", "here", "licence", "needs"], lines)

    def _models(self) -> str:
        lines = []
        for name in self.llms:
            shape, checkpoint = self.shape(name), self.study.llms[name].checkpoint
            size = 2 * shape.parameters if shape else None
            self._add("models", 0, size or 0)
            is_hub = isinstance(checkpoint, HubCheckpoint)
            lines.append(
                [
                    name,
                    getattr(checkpoint, "id", checkpoint.source),
                    _bytes(size) if size else "unknown until downloaded",
                    _bytes(MEMORY * size) if size else "?",
                    _here(Path("resources/llms") / name),
                    "an account that accepted its terms, if gated" if is_hub else "nothing",
                ]
            )
        for name in self.towers:
            if not self.study.trained(name):
                run = self.study.run(name)
                licence = getattr(run, "licence", "")
                place = Path("resources/towers") / name
                lines.append([name, "pretrained tower", "", "", _here(place), f"licence {licence}"])
        for captioner in dict.fromkeys(self.captioned.values()):
            who = self.study.captioners[captioner]
            lines.append([captioner, getattr(who, "id", who.engine), "", "", "", who.engine])
        token = (
            "is set" if get_token() else "is not set: gated and private repositories will refuse"
        )
        table = _table(["model", "source", "weights", "GPU memory", "here", "needs"], lines)
        offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"{table}\nThe hub's token (HF_TOKEN) {token}{offline}.\n"

    def _captions(self) -> str:
        lines = []
        for dataset, captioner in self.captioned.items():
            who = self.study.captioners[captioner]
            images = self.study.datasets[dataset].images
            is_published = isinstance(who, PublishedCaptions)
            kinds = who.files if isinstance(who, PublishedCaptions) else who.prompts
            hours = 0 if is_published else images / self.assumptions.captions_per_second / 3600
            disk = images * sum(costs.CHARACTERS.get(kind, 100) for kind in kinds)
            self._add("captions", hours, disk)
            parts = self.study.caption_parts(captioner, dataset)
            lines.append(
                [dataset, captioner, f"{images:,}", str(parts), _hours(hours), _bytes(disk)]
            )
        return _table(["set", "captioner", "images", "jobs", "GPU-hours", "text"], lines)

    def _embeddings(self) -> str:
        lines = []
        for store in self.stores:
            shape, rows, facets = self.shape(store.llm), self.rows(store), len(self.facets(store))
            head = [store.llm, f"{store.bundle}/{store.kind}", f"{rows:,}", str(facets)]
            if shape is None:
                lines.append([*head, *["?"] * 6])
                continue
            prefix = costs.PREFIX_TOKENS.get(store.kind, costs.OTHER_PREFIX_TOKENS)
            suffix = costs.SUFFIX_TOKENS
            one, many = (
                rows * costs.embedding_flop(shape, prefix, suffix, facets, passes=passes)
                for passes in (False, True)
            )
            hours = self._hours(one, self.assumptions.embed_use)
            sizes = costs.store_bytes(rows, facets, shape.width)
            self._add("embeddings", hours, sizes[self.study.embedding.storage])
            lines.append(
                [
                    *head,
                    f"{one / 1e18:,.1f}",
                    _hours(hours),
                    _hours(self._hours(many, self.assumptions.embed_use)),
                    *map(_bytes, sizes.values()),
                ]
            )
        head = ["LLM", "captions of", "captions", "facets", "EFLOP", "GPU-hours", "in K passes"]
        return _table([*head, "float16", "fp8", "int8"], lines)

    def _trainings(self) -> str:
        lines = []
        for name in self.towers:
            if not self.study.trained(name):
                continue
            settings, run = stages.train(self.study, name), self.study.run(name)
            shape = self.shape(run.llm) if isinstance(run, FlameRun) else None
            images = self.study.datasets[settings.dataset].images * settings.recipe.epochs
            head = [name, settings.backbone.timm, f"{images / 1e6:,.1f} M"]
            if isinstance(run, FlameRun) and shape is None:
                lines.append([*head, *["?"] * 5])
                continue
            cost = costs.tower_cost(settings, shape.width if shape else 0)
            hours = self._hours(3 * cost.forward * images, self.assumptions.train_use)
            self._add("trainings", hours, 3 * costs.STATE_BYTES * cost.parameters)
            batch = settings.recipe.batch_size
            lines.append(
                [
                    *head,
                    f"{cost.parameters / 1e6:,.0f} M",
                    f"{3 * cost.forward / 1e9:,.0f}",
                    _hours(hours),
                    _bytes(costs.STATE_BYTES * cost.parameters),
                    f"{_bytes(batch * cost.activations)} at {batch:,}",
                ]
            )
        head = ["run", "backbone", "images", "parameters", "GFLOP per image", "GPU-hours"]
        return _table([*head, "state", "activations per batch, over all GPUs"], lines)

    def _evaluations(self) -> str:
        lines = []
        for bundle, count in Counter(bundle for _, bundle in self.evaluations).items():
            name = next(name for name, of in self.evaluations if of == bundle)
            asked = self.study.questions(name, bundle)
            sets = {n for q in asked for n in (q.dataset, q.train) if n}
            images = sum(self.study.datasets[n].images for n in sets)
            hours = count * images / self.assumptions.images_per_second / 3600
            self._add("evaluations", hours, 0)
            lines.append([bundle, str(count), f"{images:,}", _hours(hours)])
        return _table(["bundle", "towers", "images", "GPU-hours"], lines)

    def _total(self) -> str:
        lines = [
            [stage, _hours(hours), _bytes(disk)] for stage, (hours, disk) in self.totals.items()
        ]
        hours, disk = (sum(total[i] for total in self.totals.values()) for i in (0, 1))
        return _table(["", "GPU-hours", "disk"], [*lines, ["total", _hours(hours), _bytes(disk)]])

    def _assumptions(self) -> str:
        a = self.assumptions
        lines = [
            f"a GPU with {a.peak:,.0f} TFLOP/s, of which embedding reaches {a.embed_use:.0%} and "
            f"training {a.train_use:.0%}",
            f"one GPU captions {a.captions_per_second:g} images/s and evaluates "
            f"{a.images_per_second:g} images/s",
            "tokens per caption with its template: "
            + ", ".join(f"{kind} {count}" for kind, count in costs.PREFIX_TOKENS.items())
            + f"; {costs.SUFFIX_TOKENS} per facet",
            f"{ROWS_OF_IMAGE} captions per benchmark image, {CLASS_TEXTS:,} class texts each",
            f"{BYTES_OF_IMAGE / 1e3:.0f} kB per image if the download size is not published",
            "training costs three forward passes; embedding needs "
            f"{MEMORY:g} times the memory of its LLM's weights, a download 1 kB per image",
        ]
        return "".join(f"- {line}\n" for line in lines) + "\nNone of this was measured.\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return markdown_table([head, ["---"] * len(head), *lines]) if lines else ""


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def _here(folder: Path) -> str:
    return "yes" if folder.exists() else "no"
