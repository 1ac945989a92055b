"""Estimate of what a study takes: jobs, GPU-hours, disk, memory, access."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_token

from flame.data.datasets import module
from flame.report import caption_costs, costs, memory_table
from flame.report.extent import CLASS_TEXTS, ROWS_OF_IMAGE, Extent
from flame.report.markdown import markdown_table
from flame.report.rates import Assumptions, Rates, RatesFile
from flame.study import gpu_memory, stages
from flame.study.schema.data import PublishedCaptions
from flame.study.schema.llms import HubCheckpoint
from flame.study.schema.runs import FlameRun
from flame.study.settings import Training
from flame.study.shapes import published_shape
from flame.study.sizes import CHARACTERS, IMAGE_BYTES
from flame.study.study import Study
from flame.training.memory import STATE_BYTES, USABLE

START_SECONDS = 60  # of a job with a GPU: imports, weights, the first batch
ON_A_GPU = ("embed", "embed_training", "caption", "caption_by_vllm", "train", "evaluate")


class Plan:
    """Estimate of everything that a study, or some of its tables and figures, will run."""

    def __init__(
        self,
        study: Study,
        only: Sequence[str] = (),
        assumptions: Assumptions | None = None,
        measured: RatesFile | None = None,
    ) -> None:
        """Look up what is asked for; `document` computes.

        Args:
            study: the study.
            only: names of tables and figures, or `claims`; by default all of them.
            assumptions: what nobody has measured, or what takes precedence over it.
            measured: rates that somebody has measured.

        Raises:
            ValueError: an unknown table or figure.
        """
        self.study, self.extent = study, Extent(study, only)
        self.rates = Rates(assumptions or Assumptions(), measured)
        self.totals: dict[str, list[float]] = {}

    def _hours(self, flop: float, use: float) -> float:
        return flop / (self.rates["peak"].value * 1e12 * use) / 3600

    def document(self) -> str:
        """The whole estimate as Markdown."""
        self.totals = {}
        parts = {
            "Jobs": self._jobs(),
            "Data": self._data(),
            "Models": self._models(),
            "Captions": self._captions(),
            "Embeddings": self._embeddings(),
            "Trainings": self._trainings(),
            "Evaluations": self._evaluations(),
            "Starts": self._starts(),
            "Memory": memory_table.table(self.extent),
            "Total": self._total(),
            "Assumptions": self._assumptions(),
        }
        head = f"# Estimate for study {self.study.study!r}\n\n{', '.join(self.extent.only)}.\n"
        return head + "".join(f"\n## {title}\n\n{text}" for title, text in parts.items() if text)

    def _add(self, stage: str, hours: float, disk: float) -> None:
        total = self.totals.setdefault(stage, [0.0, 0.0])
        total[0] += hours
        total[1] += disk

    def _jobs(self) -> str:
        jobs = self.extent.jobs()
        lines = [[rule, f"{count:,}"] for rule, count in jobs.items()]
        return _table(["rule", "jobs"], [*lines, ["total", f"{sum(jobs.values()):,}"]])

    def _data(self) -> str:
        """One line per module, as several data sets may come from one download."""
        sources: dict[str, list[str]] = {}
        for name in self.extent.datasets:
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
            size = card.bytes if card.bytes is not None else IMAGE_BYTES * images
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
        for name in self.extent.llms:
            shape, checkpoint = published_shape(self.study, name), self.study.llms[name].checkpoint
            size = 2 * shape.parameters if shape else None
            self._add("models", 0, size or 0)
            is_hub = isinstance(checkpoint, HubCheckpoint)
            lines.append(
                [
                    name,
                    getattr(checkpoint, "id", checkpoint.source),
                    _bytes(size) if size else "unknown until downloaded",
                    self._of_gpu("embed", llm=name) if size else "?",
                    _here(Path("resources/llms") / name),
                    "an account that accepted its terms, if gated" if is_hub else "nothing",
                ]
            )
        for name in self.extent.towers:
            if not self.study.trained(name):
                run = self.study.run(name)
                licence = getattr(run, "licence", "")
                place = Path("resources/towers") / name
                lines.append([name, "pretrained tower", "", "", _here(place), f"licence {licence}"])
        for captioner in dict.fromkeys(self.extent.captioned.values()):
            who = self.study.captioners[captioner]
            needed = self._of_gpu("caption", captioner=captioner)
            lines.append([captioner, getattr(who, "id", who.engine), "", needed, "", who.engine])
        token = (
            "is set" if get_token() else "is not set: gated and private repositories will refuse"
        )
        table = _table(["model", "source", "weights", "GPU memory", "here", "needs"], lines)
        offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"{table}\nThe hub's token (HF_TOKEN) {token}{offline}.\n"

    def _of_gpu(self, rule: str, **wildcards: str) -> str:
        """Memory that a job of a rule needs on a GPU."""
        needed = gpu_memory.of_job(self.study, rule, wildcards, memory_table.GPU)
        return _bytes(gpu_memory.RESERVED * sum(needed.values())) if needed else ""

    def _captions(self) -> str:
        lines, again = [], [0.0, 0.0]
        for dataset, captioner in self.extent.captioned.items():
            who = self.study.captioners[captioner]
            images = self.study.datasets[dataset].images
            kinds = list(who.files if isinstance(who, PublishedCaptions) else who.prompts)
            disk = images * sum(CHARACTERS.get(kind, 100) for kind in kinds)
            hours, told = 0.0, "published"
            if not isinstance(who, PublishedCaptions):
                rate = caption_costs.captions_per_second(kinds, self.rates)
                hours, told = images / rate.value / 3600, f"{rate.value:.1f}"
                again = [sum(x) for x in zip(again, _at_reported(images), strict=True)]
            self._add("captions", hours, disk)
            parts = self.study.caption_parts(captioner, dataset)
            lines.append(
                [dataset, captioner, f"{images:,}", str(parts), told, _hours(hours), _bytes(disk)]
            )
        head = ["set", "captioner", "images", "jobs", "images/s", "GPU-hours", "text"]
        table = _table(head, lines)
        if not any(again) or self.rates.find("captions_per_second"):
            return table
        few, many = caption_costs.REPORTED
        return (
            f"{table}\nA formula, not a measurement of the engine. Users of other MLLMs report "
            f"{few:g} to {many:g} images/s, with which captions would take {_hours(again[1])} to "
            f"{_hours(again[0])} GPU-hours.\n"
        )

    def _embeddings(self) -> str:
        lines = []
        for store in self.extent.stores:
            shape, rows, facets = (
                published_shape(self.study, store.llm),
                self.extent.rows(store),
                len(self.extent.facets(store)),
            )
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
            hours = self._hours(one, self.rates["embed_mfu"].value)
            sizes = costs.store_bytes(rows, facets, shape.width)
            self._add("embeddings", hours, sizes[self.study.embedding.storage])
            lines.append(
                [
                    *head,
                    f"{one / 1e18:,.1f}",
                    _hours(hours),
                    _hours(self._hours(many, self.rates["embed_mfu"].value)),
                    *map(_bytes, sizes.values()),
                ]
            )
        head = ["LLM", "captions of", "captions", "facets", "EFLOP", "GPU-hours", "in K passes"]
        return _table([*head, "float16", "fp8", "int8"], lines)

    def _trainings(self) -> str:
        lines = []
        for name in self.extent.towers:
            if not self.study.trained(name):
                continue
            settings, run = stages.train(self.study, name), self.study.run(name)
            shape = published_shape(self.study, run.llm) if isinstance(run, FlameRun) else None
            images = self.study.datasets[settings.dataset].images * settings.recipe.epochs
            head = [name, settings.backbone.timm, f"{images / 1e6:,.1f} M"]
            if isinstance(run, FlameRun) and shape is None:
                lines.append([*head, *["?"] * 6])
                continue
            cost = _tower_cost(settings, shape.width if shape else 0)
            passes = self._passes(cost, settings.recipe.batch_size)
            use = self.rates.of_backbone(settings.backbone.timm).value
            hours = self._hours(passes * cost.forward * images, use)
            self._add("trainings", hours, 3 * STATE_BYTES * cost.parameters)
            batch = settings.recipe.batch_size
            lines.append(
                [
                    *head,
                    f"{cost.parameters / 1e6:,.0f} M",
                    f"{passes * cost.forward / 1e9:,.0f}",
                    f"{images / hours / 3600:,.0f}",
                    _hours(hours),
                    _bytes(STATE_BYTES * cost.parameters),
                    f"{_bytes(batch * cost.activations)} at {batch:,}",
                ]
            )
        head = ["run", "backbone", "images", "parameters", "GFLOP per image"]
        head += ["images/s", "GPU-hours", "state", "activations per batch, over all GPUs"]
        return _table(head, lines)

    def _passes(self, cost: costs.TowerCost, batch: int) -> int:
        """Forward passes that a training costs per image, the backward pass counting as two."""
        assumed = self.rates.assumptions
        activations = cost.activations * batch / assumed.gpus
        state = STATE_BYTES * cost.parameters
        return 3 if activations + state <= USABLE * assumed.gpu_memory * 1e9 else 4

    def _evaluations(self) -> str:
        lines, rate = [], self.rates["images_per_second"].value
        for bundle, count in Counter(bundle for _, bundle in self.extent.evaluations).items():
            name = next(name for name, of in self.extent.evaluations if of == bundle)
            images = self.extent.images(name, bundle)
            hours = count * images / rate / 3600
            self._add("evaluations", hours, 0)
            lines.append([bundle, str(count), f"{images:,}", _hours(hours)])
        return _table(["bundle", "towers", "images", "GPU-hours"], lines)

    def _starts(self) -> str:
        jobs = sum(count for rule, count in self.extent.jobs().items() if rule in ON_A_GPU)
        hours = jobs * START_SECONDS / 3600
        self._add("starts", hours, 0)
        return _table(["jobs with a GPU", "GPU-hours"], [[f"{jobs:,}", _hours(hours)]])

    def _total(self) -> str:
        lines = [
            [stage, _hours(hours), _bytes(disk)] for stage, (hours, disk) in self.totals.items()
        ]
        hours, disk = (sum(total[i] for total in self.totals.values()) for i in (0, 1))
        return _table(["", "GPU-hours", "disk"], [*lines, ["total", _hours(hours), _bytes(disk)]])

    def _assumptions(self) -> str:
        rates, a = self.rates, self.rates.assumptions
        lines = [
            *rates.told("peak", "a GPU with {:,.0f} TFLOP/s"),
            *rates.told("embed_mfu", "embedding at {:.1%} of that"),
            *rates.told("train_mfu", "training at {:.1%} of that"),
            *self._of_captions(),
            *rates.told("images_per_second", "evaluation of {:,.0f} images/s"),
            f"a training costs three forward passes, and a fourth if its batch does not fit "
            f"{a.gpus} GPUs of {a.gpu_memory:g} GB, so that it is split or activations are "
            "recomputed",
            "tokens per caption with its template: "
            + ", ".join(f"{kind} {count}" for kind, count in costs.PREFIX_TOKENS.items())
            + f"; {costs.SUFFIX_TOKENS} per facet",
            f"{ROWS_OF_IMAGE} short captions per benchmark image, {CLASS_TEXTS:,} class texts each",
            f"{IMAGE_BYTES / 1e3:.0f} kB per image if the download size is not published",
            f"a job with a GPU takes {START_SECONDS} s to start",
        ]
        listed = "".join(f"- {line}\n" for line in lines)
        used = "Everything else is assumed." if rates.measured else "None of this was measured."
        return f"{listed}\n{used}\n"

    def _of_captions(self) -> list[str]:
        """Where the rate of each captioner comes from."""
        told = list(self.rates.told("captions_per_second", "captions of {:.1f} images/s"))
        if told or not self._hours_of("captions"):
            return told
        a, c = self.rates.assumptions, caption_costs
        measured = [
            *self.rates.told("slices_per_second", "captioner: {:,.0f} slices/s"),
            *self.rates.told("prompt_tokens_per_second", "captioner: {:,.0f} prompt tokens/s"),
            *self.rates.told("caption_tokens_per_second", "captioner: writes {:,.0f} tokens/s"),
        ]
        return [
            f"captions by formula: {c.SLICES} slices of {c.slice_flop() / 1e12:.2f} TFLOP, "
            f"{c.SLICES * c.SLICE_TOKENS + c.PROMPT_TOKENS} tokens read once for all captions at "
            f"{a.caption_mfu:.0%} of the peak; {c.CAPTION_TOKENS['long']} and "
            f"{c.CAPTION_TOKENS['short']} tokens written by {c.SEQUENCES} sequences at a time, at "
            f"{a.caption_bandwidth:.0%} of {a.bandwidth:g} TB/s; the GPU is busy "
            f"{a.caption_engine:.0%} of the time: assumed",
            *measured,
        ]

    def _hours_of(self, stage: str) -> float:
        return self.totals.get(stage, [0.0])[0]


_COUNTED: dict[tuple[str, int], costs.TowerCost] = {}


def _tower_cost(settings: Training, dim: int) -> costs.TowerCost:
    """Cost of a tower, counted once for runs that differ in data and targets only."""
    others = {"run", "seed", "dataset", "targets", "captions", "max_skipped"}
    key = settings.model_dump_json(exclude=others), dim
    if key not in _COUNTED:
        _COUNTED[key] = costs.tower_cost(settings, dim)
    return _COUNTED[key]


def _at_reported(images: int) -> list[float]:
    """GPU-hours of captions at the lowest and the highest rate that users report."""
    return [images / rate / 3600 for rate in caption_costs.REPORTED]


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
