"""Memory of a job, by formula: what the rules ask a cluster for, and what `flame.plan` prints.

Each formula returns the largest allocations of its job in bytes, by what they hold. They are those
of the main memory of one node; `flame.study.gpu_memory` has those of the GPU. Bytes per row are the
growth of the resident set at a million rows; tests/study/test_memory.py measures them again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flame.study import stages
from flame.study.schema.data import PublishedCaptions, ServerCaptioner, VllmCaptioner
from flame.study.schema.llms import HubCheckpoint
from flame.study.schema.runs import FlameRun
from flame.study.shapes import Shape, TowerShape, assumed_shape, tower_shape
from flame.study.sizes import (
    CLASSES,
    characters,
    image_bytes,
    own_kinds,
    queries,
    store_rows,
    texts,
)
from flame.study.study import Study

Bytes = dict[str, float]

MB, GB = 1e6, 1e9
MARGIN = 1.25  # of a request over its formula: for allocators, and for what a formula leaves out

# --- programs -------------------------------------------------------------------------------
SUBMISSION = 300 * MB  # Snakemake and srun around a job, by their resident sets
PLAIN = 300 * MB  # an interpreter with polars
TORCH = 800 * MB  # the same with torch, transformers, timm and open_clip, and their work space
CUDA = 3 * GB  # what a process with a CUDA context adds: libraries, pinned memory; not measured
WORKER = 600 * MB  # a worker of a loader: torch without a CUDA context, and open files
BUFFERS = 2 * GB  # of a download from the hub, by the client's limits
# vLLM's defaults: 4 GiB of swap space, 4 GiB of preprocessed images in each of two processes; and
# four processes of its own. docs.vllm.ai, "Conserving Memory".
VLLM = 12 * (1 << 30) + 4 * (CUDA + TORCH)

# --- rows -----------------------------------------------------------------------------------
INDEX_ROW = 120  # an image in the index of a data set, as opened
WRITTEN_IMAGE, WRITTEN_TEXT = 700, 220  # an image and a caption that a download holds until its end
KEY_ROW = 90  # a key of a store or of captions, joined to the images
JOINED_ROW = 200  # an image, while captions are joined to it
TEXT_ROW = 140  # a caption in memory, besides two copies of its characters
KNOWN_KEY = 230  # a key that published captions are matched by
MERGED_ROW = 120  # a caption that is joined to others, besides its characters
HIT_ROW = 320  # a query in the hits of a result
TOKEN_ROW = 130  # a token with its place in a text, while captions are truncated

SHARD_IMAGES = 10_000  # of a tar shard, which a download holds until it is written
PAGE_IMAGE = 1.5  # such an image, relative to its average size
SHARD_ROWS = 4 * 512  # of a store, embedded together
ITEM_IMAGES = 64  # of a work item of a loader
PREFETCHED = 2  # batches, and work items of each worker, that wait
CAPTION_IMAGES = 512  # decoded images of a captioner that wait
DECODED = 3 * 1_000_000  # bytes of a decoded image of unknown size: one megapixel
CACHED = 2 * (1 << 30)  # features of an evaluation, and each cache of the timings
CHUNK = 1024  # texts or queries that are ranked at once
WORDS = 256  # hidden states that the head of an LLM reads at once
PARAMETERS_OF_MLLM = 8_600_000_000  # MiniCPM-Llama3-V 2.5: 8.54 billion
TOKENS = 77  # of a text, as CLIP reads it
LONG_TOKENS = 248  # as Long-CLIP does
FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Machine:
    """What a profile gives a job of a rule; see docs/cluster.md.

    Args:
        gpus: of a node, with a process each; 0: one process on a CPU.
        workers: of each process, that decode images ahead; threads of a captioner.
        cache_mb: for the images, and for the texts of a kind, of each process, in MiB.
        batch_size: images in a forward pass of an evaluation.
        token_budget: tokens in a batch of the LLM; auto: as many as are good for the device.
    """

    gpus: int = 0
    workers: int = 0
    cache_mb: int = 1000
    batch_size: int = 256
    token_budget: int | str = 1024

    @property
    def tokens(self) -> int:
        """Tokens in a batch of the LLM."""
        if isinstance(self.token_budget, int):
            return self.token_budget
        return 16_384 if self.gpus else 1024

    @property
    def processes(self) -> int:
        """Processes of a training on a node."""
        return max(1, self.gpus)

    @property
    def torch(self) -> float:
        """Bytes of a process that has imported torch, before it does anything."""
        return TORCH + (CUDA if self.gpus else 0)


def request_mb(study: Study, rule: str, wildcards: Mapping[str, str], machine: Machine) -> int:
    """Megabytes to ask for: the formula with a margin, in steps of 100."""
    needed = sum(of_job(study, rule, wildcards, machine).values())
    return 100 * math.ceil((MARGIN * needed + SUBMISSION) / MB / 100)


def of_job(study: Study, rule: str, wildcards: Mapping[str, str], machine: Machine) -> Bytes:
    """What a job holds in the memory of a node at its peak.

    Args:
        study: the study.
        rule: key of `flame.study.jobs.JOBS`.
        wildcards: of the job.
        machine: settings of the machine.
    """
    return FORMULAS[rule](study, machine, **wildcards)


# --- downloads ------------------------------------------------------------------------------


def download_dataset(study: Study, machine: Machine, dataset: str) -> Bytes:
    """Index and captions until the end, and the images of one tar shard."""
    images = study.datasets[dataset].images
    written = sum(
        texts(study, dataset, kind) * (WRITTEN_TEXT + 3 * characters(kind))
        for kind in own_kinds(study, dataset)
    )
    drawings = study.datasets[dataset].drawings
    pending = drawings * min(images, SHARD_IMAGES) * PAGE_IMAGE * image_bytes(study, dataset)
    index = drawings * WRITTEN_IMAGE * images
    return {"program": PLAIN, "index": index + written, "shard": pending}


def download_llm(study: Study, machine: Machine, llm: str) -> Bytes:
    """Nothing but buffers from the hub; weights twice where they are converted or drawn anew."""
    chosen, weights = study.llms[llm], FLOAT * assumed_shape(study, llm).parameters
    is_hub = isinstance(chosen.checkpoint, HubCheckpoint)
    converted = 2 * weights if not is_hub or chosen.reset is not None else 0
    return {"program": TORCH, "buffers": BUFFERS if is_hub else 0, "conversion": converted}


def download_tower(study: Study, machine: Machine, run: str) -> Bytes:
    """The weights as downloaded, and those of the tower that is written."""
    weights = FLOAT * tower_shape(study, run).parameters
    return {"program": TORCH, "buffers": BUFFERS, "conversion": 2 * weights}


# --- captions -------------------------------------------------------------------------------


def caption(study: Study, machine: Machine, captioner: str, dataset: str, part: str) -> Bytes:
    """By engine: keys of published captions, images on their way to a server, or the MLLM."""
    who, images = study.captioners[captioner], study.datasets[dataset].images
    if isinstance(who, PublishedCaptions):
        return {"program": PLAIN + BUFFERS, "keys": 2 * KNOWN_KEY * images}
    own = images / study.caption_parts(captioner, dataset) * (TEXT_ROW + 2 * characters("raw"))
    waiting = (CAPTION_IMAGES + machine.workers) * DECODED
    found = {"index": INDEX_ROW * images, "captions": own, "images": waiting}
    if isinstance(who, ServerCaptioner):  # each request holds a PNG in base64, too
        return {"program": PLAIN, **found, "requests": 3 * who.concurrency * DECODED}
    weights = HALF * PARAMETERS_OF_MLLM
    if isinstance(who, VllmCaptioner):
        return {"program": VLLM, **found, "MLLM": weights}
    there = sum(path.stat().st_size for path in Path(who.id).glob("*.safetensors"))
    held = 1 if machine.gpus else 2  # read by mapped files, which count, too
    return {"program": machine.torch, **found, "MLLM": held * (there or weights)}


def captions(study: Study, machine: Machine, captioner: str, dataset: str) -> Bytes:
    """All captions of a data set, to count their words and to find those that are shared."""
    images, kinds = study.datasets[dataset].images, {"raw", "short", "long"}
    merged = images * sum(MERGED_ROW + characters(kind) for kind in kinds)
    return {"program": PLAIN, "captions": merged}


# --- LLM ------------------------------------------------------------------------------------


def _loaded(study: Study, machine: Machine, llm: str) -> Bytes:
    """An LLM while it is loaded: its weights, and the pages of its file, which is mapped.

    A GPU gets the weights straight from the file, a few tensors at a time. On a CPU they are in
    float32 at most. The system may drop the pages, but they count as used.
    """
    shape, checkpoint = assumed_shape(study, llm), study.llms[llm].checkpoint
    passing = 2 * HALF * shape.vocabulary * shape.width
    return {
        "LLM": passing if machine.gpus else FLOAT * shape.parameters,
        "checkpoint": (HALF if isinstance(checkpoint, HubCheckpoint) else FLOAT) * shape.parameters,
    }


def layer_bytes(shape: Shape, tokens: int, size: int) -> float:
    """Bytes of what one decoder layer computes for some tokens, in numbers of `size` bytes."""
    attention = (2 * shape.heads + 2 * shape.key_heads) * shape.head_dim
    return size * tokens * (3 * shape.hidden + 4 * shape.width + attention)


def embed(study: Study, machine: Machine, llm: str, bundle: str, kind: str, part: str) -> Bytes:
    """The LLM, the captions of a part, and the vectors of some shards, in float32 and float16."""
    shape, facets = assumed_shape(study, llm), len(study.embedded_facets(llm, bundle, kind))
    rows = store_rows(study, bundle, kind) / study.parts(bundle, kind)
    each: float = TEXT_ROW + KEY_ROW + 2 * characters(kind)
    if study.embedding.max_caption_tokens is not None:
        each += TOKEN_ROW * characters(kind) / 4  # characters of a token
    layer = 0 if machine.gpus else layer_bytes(shape, machine.tokens, FLOAT)
    return {
        "program": machine.torch,
        **_loaded(study, machine, llm),
        "captions": rows * each,
        "vectors": SHARD_ROWS * facets * shape.width * (2 * FLOAT + HALF),
        "layer": layer,
    }


# --- towers ---------------------------------------------------------------------------------


def _opened(study: Study, run: str, dataset: str) -> Bytes:
    """Index of the images, and keys of the captions with the texts that a baseline reads."""
    held = (INDEX_ROW + JOINED_ROW) * study.datasets[dataset].images
    for kind in _text_kinds(study, run):
        words = 0 if isinstance(study.run(run), FlameRun) else characters(kind)
        held += texts(study, dataset, kind) * (KEY_ROW + words)
    return {"index and keys": held}


def _cache(study: Study, run: str, dataset: str, limit: float) -> float:
    """Images and texts that fit into the cache; images twice, while they are put together."""
    settings = stages.train(study, run)
    given = study.datasets[dataset]
    images = given.drawings * given.images * 3 * settings.backbone.image_size**2
    sizes = [
        _text_bytes(study, run, kind) * texts(study, dataset, kind)
        for kind in _text_kinds(study, run)
    ]
    return sum(size for size in sizes if size <= limit) + (2 * images if images <= limit else 0)


def _text_kinds(study: Study, run: str) -> tuple[str, ...]:
    if isinstance(study.run(run), FlameRun):
        return tuple(study.targets(run))
    return study.baseline_kinds(run)


def _text_bytes(study: Study, run: str, kind: str) -> int:
    """Bytes of a caption in a batch: its vectors, or its tokens."""
    chosen = study.run(run)
    if isinstance(chosen, FlameRun):
        facets = study.embedded_facets(chosen.llm, study.bundle(study.dataset_of(run)), kind)
        return HALF * len(facets) * assumed_shape(study, chosen.llm).width
    return FLOAT * LONG_TOKENS


def _validated(study: Study, run: str, processes: int) -> float:
    """Images of a process, decoded, and all features, which the first process compares."""
    shape, settings, held = tower_shape(study, run), stages.validation(study, run), 0.0
    for question in settings.questions:
        images = study.datasets[question.dataset].images
        images = min(images, settings.images or images)
        rows = CLASSES
        if question.captions and question.task != "zeroshot":
            rows = texts(study, question.dataset, question.captions)
        pixels = images * 3 * shape.image_size**2 / processes
        held += INDEX_ROW * images + pixels + 2 * FLOAT * shape.width * (images + rows)
    return held


def train(study: Study, machine: Machine, run: str) -> Bytes:
    """Every process opens the data set; workers and caches are its own, too."""
    dataset, settings = study.dataset_of(run), stages.train(study, run)
    shape, recipe, processes = tower_shape(study, run), settings.recipe, machine.processes
    image = 3 * shape.image_size**2
    row = image + sum(_text_bytes(study, run, kind) for kind in _text_kinds(study, run))
    waiting = PREFETCHED * (recipe.batch_size / processes + machine.workers * ITEM_IMAGES) * row
    pixels = (
        0 if machine.gpus else 2 * FLOAT * image * recipe.batch_size
    )  # before and after the crop
    # Weight, gradient and both moments. On a GPU only a checkpoint passes through main memory.
    state = 3 * FLOAT * shape.parameters
    found = {
        "program": machine.torch,
        **_opened(study, run, dataset),
        "cache": _cache(study, run, dataset, machine.cache_mb << 20),
        "batches": waiting + pixels,
        "workers": machine.workers * WORKER,
        "validation": _validated(study, run, processes),
    }
    found = {what: processes * held for what, held in found.items()}
    if machine.gpus:
        return found | {"checkpoint": state}
    # Each layer keeps about eight times its output for the backward pass (arXiv 2205.05198).
    kept = 8 * FLOAT * shape.values * recipe.batch_size
    return found | {"tower": state + FLOAT * shape.parameters, "activations": kept}


def _running(shape: TowerShape, machine: Machine) -> Bytes:
    """A tower in evaluation: its weights as mapped and as loaded, a batch and its pixels."""
    image = 3 * shape.image_size**2
    values = 0 if machine.gpus else 8 * FLOAT * shape.values / 12
    items = machine.workers * PREFETCHED * ITEM_IMAGES * image
    return {
        "tower": 2 * FLOAT * shape.parameters,
        "batches": machine.batch_size * (2 * image + FLOAT * image + values) + items,
        "workers": machine.workers * WORKER,
    }


def evaluate(study: Study, machine: Machine, run: str, bundle: str) -> Bytes:
    """Features of the images of some data sets, and of the texts of one."""
    shape, asked = tower_shape(study, run), study.questions(run, bundle)
    is_stored = isinstance(study.run(run), FlameRun)
    width, vector = shape.width, FLOAT * shape.width
    sets = {name: study.datasets[name].images for q in asked for name in (q.dataset, q.train)
            if name}  # fmt: skip
    images = [max(width, 1024) * FLOAT * count for count in sets.values()]
    ranked = 0.0
    for question in asked:
        if question.captions is None:
            continue
        rows = texts(study, question.dataset, question.captions)
        # Stored class texts are read class by class; all others are compared as a whole.
        whole = CLASSES if is_stored and question.task == "zeroshot" else rows
        own = rows * KEY_ROW
        if not is_stored:  # the tower encodes the texts, in batches
            batch = 0 if machine.gpus else 12 * FLOAT * TOKENS * machine.batch_size * width
            own += 2 * characters(question.captions) * rows + batch
        ranked = max(ranked, own + 2 * whole * vector + FLOAT * CHUNK * whole)
    return {
        "program": machine.torch,
        **_running(shape, machine),
        "index": INDEX_ROW * sum(sets.values()),
        "images": min(sum(images), CACHED) + 2 * max(images, default=0),
        "texts": ranked,
    }


def fewshot(study: Study, machine: Machine, run: str, benchmark: str) -> Bytes:
    """The whole LLM, its head in float32 where it computes, and the tower."""
    chosen, flame = study.benchmarks[benchmark], study.flame_run(run)
    shape = assumed_shape(study, flame.llm)
    bundle = study.bundle(study.dataset_of(run))
    rows = store_rows(study, bundle, chosen.captions or "")
    head = 0 if machine.gpus else FLOAT * shape.vocabulary * (shape.width + 4 * WORDS)
    return {
        "program": machine.torch,
        **_loaded(study, machine, flame.llm),
        "head": head,
        **_running(tower_shape(study, run), machine),
        "index": INDEX_ROW * study.datasets[chosen.dataset].images + KEY_ROW * rows,
    }


def knowledge(study: Study, machine: Machine, llm: str) -> Bytes:
    """Vectors of one facet in float64 as they are, centred and rotated; outputs of a probe."""
    assert study.knowledge is not None
    rows = texts(study, study.knowledge.dataset, study.knowledge.captions)
    vectors = 4 * 2 * FLOAT * assumed_shape(study, llm).width * rows
    return {"program": TORCH, "vectors": vectors, "outputs": 4 * 2 * FLOAT * CLASSES * rows}


def variance(study: Study, machine: Machine) -> Bytes:
    """Every query of the runs that were trained several times."""
    return {"program": PLAIN, "hits": HIT_ROW * queries(study, study.variance_comparison()[1])}


def knowledge_table(study: Study, machine: Machine) -> Bytes:
    """A few hundred numbers."""
    return {"program": PLAIN}


def overhead(study: Study, machine: Machine) -> Bytes:
    """The LLM, the captions of all kinds, and three trainings."""
    assert study.overhead is not None
    run, baseline = study.overhead.run, study.overhead.baseline
    dataset, llm = study.dataset_of(run), study.flame_run(run).llm
    images = study.datasets[dataset].images
    kinds = _text_kinds(study, run)
    words = sum(images * (TEXT_ROW + 2 * characters(kind)) for kind in ("long", *kinds))
    one = Machine(machine.gpus and 1, machine.workers)
    trained = {name: train(study, one, name) for name in (run, baseline)}
    held = sum(sum(each.values()) - each["program"] for each in trained.values())
    return {
        "program": machine.torch,
        **_loaded(study, machine, llm),
        "captions": words,
        "trainings": held,
        "online training": sum(trained[run].values()) - trained[run]["program"],
        "caches": (len(kinds) + 4) * CACHED if images * 20_000 > CACHED else 0,
    }


def export(study: Study, machine: Machine, run: str) -> Bytes:
    """Copies of files."""
    return {"program": TORCH}


# --- results --------------------------------------------------------------------------------


def prompt(study: Study, machine: Machine, prompt: str, facet: str) -> Bytes:
    """A line of text."""
    return {"program": 10 * MB}


def table(study: Study, machine: Machine, table: str) -> Bytes:
    """Every query of the results that it shows."""
    return {"program": PLAIN, "hits": HIT_ROW * queries(study, study.table_comparison(table)[1])}


def claims(study: Study, machine: Machine) -> Bytes:
    """Every query of the results that claims are tested on."""
    found = study.claims_comparison(study.claims.values())[1]
    return {"program": PLAIN, "hits": HIT_ROW * queries(study, found)}


def appendix(study: Study, machine: Machine, appendix: str) -> Bytes:
    """Lines of the study."""
    return {"program": PLAIN}


def figure(study: Study, machine: Machine, figure: str) -> Bytes:
    """Queries of results, and of stores one vector a caption with its text."""
    found = queries(study, study.figure_results(figure))
    stored = 0.0
    for llm, bundle, kind in study.figure_stores(figure):
        each = 3 * FLOAT * assumed_shape(study, llm).width + TEXT_ROW + 6 * characters(kind)
        stored += store_rows(study, bundle, kind) * each
    return {"program": TORCH, "hits": HIT_ROW * found, "captions": stored}


FORMULAS: dict[str, Callable[..., Bytes]] = {
    each.__name__: each
    for each in (download_dataset, download_llm, download_tower, caption, captions, prompt, embed,
                 train, evaluate, fewshot, knowledge, knowledge_table, overhead, export, table,
                 claims, variance, appendix, figure)
}  # fmt: skip
