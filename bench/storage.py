"""What 8 bits cost: size and error of a run's stores, and recall of the tower trained on them.

    python bench/storage.py             # after `make table6`
    python bench/storage.py --errors    # stores only, no training

Takes the float16 stores of a FLAME run and of its benchmarks from a folder in which a study was
run, writes them anew as float16, fp8 and int8 by the package's own writer, and compares. Then it
trains the run on each, with one seed and the same order of the same images, and asks its
benchmarks. Differences to float16 are paired: the same queries are drawn for both.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl

from flame.embedding import store
from flame.embedding.quantization import STORAGES, Name
from flame.embedding.store import Embeddings
from flame.evaluate import evaluate
from flame.evaluation.bootstrap import mean_interval
from flame.study import stages
from flame.study.load import load_file
from flame.study.settings import EvaluateSettings, Question
from flame.study.study import Study
from flame.train import train

ROWS = 512  # compared at a time
MEASURES = {  # benchmark -> metric
    "ShareGPT4V-val": ("i2t_r@1", "t2i_r@1"),
    "Urban-1k": ("i2t_r@1", "t2i_r@1"),
    "MSCOCO": ("i2t_r@1", "t2i_r@1"),
    "ImageNet-1k": ("top1",),
}


class Source:
    """A run of a study that was run in a folder, and what its benchmarks are asked on."""

    def __init__(self, folder: Path, study: Study, run: str) -> None:
        """Look up the names; nothing is read yet."""
        self.folder, self.study, self.name = folder, study, run
        self.run = study.flame_run(run)
        bundles = dict.fromkeys(study.bundle(study.benchmarks[name].dataset) for name in MEASURES)
        asked = [question for bundle in bundles for question in study.questions(run, bundle)]
        self.questions = tuple(question for question in asked if question.benchmark in MEASURES)

    def dataset(self, name: str) -> Path:
        """Folder of a data set."""
        return self.folder / "resources/datasets" / name

    def stores(self, kinds: list[str]) -> Iterator[tuple[str, str, Embeddings]]:
        """Data set, caption kind and float16 embeddings: of the training, then of benchmarks.

        Args:
            kinds: of captions; all if there are none.
        """
        wanted = [(self.run.dataset, kind) for kind in self.run.targets]
        wanted += [(q.dataset, str(q.captions)) for q in self.questions]
        for dataset, kind in dict.fromkeys(wanted):
            if kinds and kind not in kinds:
                continue
            bundle = self.study.bundle(dataset)
            parts = self.folder / "results/embed" / self.run.llm / bundle / kind
            paths = [*parts.glob("*.zarr")]
            if not paths:
                raise ValueError(f"there are no stores in {parts}: run the study first")
            yield dataset, kind, Embeddings.open(paths, dataset)


def rewrite(embeddings: Embeddings, path: Path, dataset: str, storage: Name) -> Embeddings:
    """The same vectors in one part, stored in another way."""
    own = {"part": 0, "parts": 1, "storage": storage}
    attributes = {k: v for k, v in embeddings.attributes.items() if k != "format"}
    store.create(path, attributes | own)
    writer = store.Writer(
        path,
        dataset,
        keys=embeddings.keys,
        facets=embeddings.facets,
        dim=embeddings.dim,
        storage=storage,
    )
    for rows in writer.missing():
        writer.write(rows, embeddings.rows(np.arange(rows.start, rows.stop)))
    return Embeddings.open([path], dataset)


def errors(exact: Embeddings, stored: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """1 - cosine of every vector with what was stored of it, (N K,) each.

    The second is of what is left after the mean vector of the facet is subtracted, which is what a
    recipe with `standardize: center` trains on: vectors of an LLM all point about the same way.
    """
    mean, found = exact.mean(), []
    for start in range(0, len(exact.keys), ROWS):
        rows = np.arange(start, min(start + ROWS, len(exact.keys)))
        one, two = (each.rows(rows).astype(np.float64) for each in (exact, stored))
        found.append([1 - cosine(one, two), 1 - cosine(one - mean, two - mean)])
    plain, centered = (np.concatenate([block[i].ravel() for block in found]) for i in (0, 1))
    return plain, centered


def cosine(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Cosine of vectors (n, K, D), (n, K)."""
    norms = np.linalg.norm(one, axis=2) * np.linalg.norm(two, axis=2)
    return np.minimum((one * two).sum(axis=2) / norms, 1)


def size(path: Path) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def store_all(
    source: Source, scratch: Path, storages: list[Name], kinds: list[str]
) -> dict[Name, list[Path]]:
    """Stores of some caption kinds, or all, in every way; prints how large they are, how wrong."""
    head = f"{'data set':14} {'kind':6} {'storage':8} {'rows':>7} {'MB':>8} {'of float16':>10}"
    print(f"{head} {'mean error':>11} {'worst':>9} {'centered':>9} {'worst':>9}")
    paths: dict[Name, list[Path]] = {storage: [] for storage in storages}
    for dataset, kind, exact in source.stores(kinds):
        whole = 2 * len(exact.keys) * len(exact.facets) * exact.dim
        for storage in storages:
            path = scratch / storage / dataset / f"{kind}.zarr"
            plain, centered = errors(exact, rewrite(exact, path, dataset, storage))
            bytes_ = size(path)
            print(
                f"{dataset:14} {kind:6} {storage:8} {len(exact.keys):7} {bytes_ / 1e6:8.1f}"
                f" {bytes_ / whole:10.3f} {plain.mean():11.1e} {plain.max():9.1e}"
                f" {centered.mean():9.1e} {centered.max():9.1e}"
            )
            paths[storage].append(path)
    return paths


def measure(source: Source, stores: list[Path], out: Path, threads: int) -> float:
    """Train on some stores and ask the benchmarks; gives the seconds of training."""
    trained_on = [path for path in stores if path.parent.name == source.run.dataset]
    started = time.perf_counter()
    train(
        source.dataset(source.run.dataset),
        out / "tower",
        stages.train(source.study, source.name),
        stores=tuple(trained_on),
        threads=threads,
    )
    seconds = time.perf_counter() - started
    for question in source.questions:
        ask(source, question, stores, out, threads)
    return seconds


def ask(source: Source, question: Question, stores: list[Path], out: Path, threads: int) -> None:
    """Answer one benchmark; a store of its own has the one data set."""
    settings = EvaluateSettings(
        run=source.name, questions=(question,), bootstrap=source.study.bootstrap, version=0
    )
    evaluate(
        out / "tower",
        [source.dataset(question.dataset)],
        out / f"{question.benchmark}.json",
        out / f"{question.benchmark}.parquet",
        settings,
        stores=tuple(path for path in stores if path.parent.name == question.dataset),
        threads=threads,
    )


def hits_of(out: Path, benchmark: str, metric: str) -> np.ndarray:
    """Hit or miss of every query, in order."""
    table = pl.read_parquet(out / f"{benchmark}.parquet").filter(metric=metric)
    return table.sort("query")["hit"].to_numpy().astype(np.float64)


def compare(source: Source, outs: dict[Name, Path]) -> None:
    """Print each metric with its 95 % interval, and how much less or more float16 has."""
    print(f"{'benchmark':15} {'metric':8} {'storage':8} {'%':>6} {'95 %':>12}  against float16")
    for benchmark, metric in ((b, m) for b, metrics in MEASURES.items() for m in metrics):
        for storage, out in outs.items():
            (record,) = json.loads((out / f"{benchmark}.json").read_text())["records"]
            rate = record["metrics"][metric]
            line = f"{benchmark:15} {metric:8} {storage:8} {rate['value']:6.1f}"
            line += f" {rate['low']:5.1f}-{rate['high']:<6.1f}"
            if storage != "float16" and "float16" in outs:
                gained = hits_of(out, benchmark, metric) - hits_of(
                    outs["float16"], benchmark, metric
                )
                bootstrap = source.study.bootstrap
                ends = mean_interval(
                    [gained[None]], resamples=bootstrap.resamples, seed=bootstrap.seed
                )
                low, high = (100 * end for end in ends)
                line += f"  {100 * gained.mean():+.1f} ({low:+.1f} to {high:+.1f})"
            print(line.rstrip())


def main() -> None:
    """Write the stores, train on them, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="in which the study was run")
    parser.add_argument("--study", type=Path, default=Path("config/config.yaml"))
    parser.add_argument("--run", default="flame-7")
    parser.add_argument("--storages", nargs="+", default=[*STORAGES], choices=[*STORAGES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--errors", nargs="*", metavar="KIND", help="only stores, of these caption kinds or of all"
    )
    parser.add_argument("--out", type=Path, help="folder that is kept; else a temporary one")
    args = parser.parse_args()
    source = Source(args.folder, load_file(args.study), args.run)
    kept = nullcontext(args.out) if args.out else tempfile.TemporaryDirectory()
    with kept as name:
        scratch = Path(name)
        stores = store_all(source, scratch / "stores", args.storages, args.errors or [])
        if args.errors is not None:
            return
        outs = {}
        for storage, paths in stores.items():
            outs[storage] = scratch / "towers" / storage
            outs[storage].mkdir(parents=True, exist_ok=True)
            seconds = measure(source, paths, outs[storage], args.threads)
            print(f"{args.run} on {storage}: trained in {seconds:.0f} s")
        compare(source, outs)


if __name__ == "__main__":
    main()
