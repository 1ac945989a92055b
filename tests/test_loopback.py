"""Table 6 of the paper study at a small size, from a local hub: from download to table."""

import io
import json
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from flame.data.datasets import cc3m
from flame.embedding import checkpoints
from flame.study.load import load_file
from flame.study.study import Study
from tests import tiny_vlm
from tests.loopback import Loopback, cut, status
from tests.preloaded import STAGES, Interpreter
from tests.workflow import ROOT, snakemake

CONFIG = ROOT / "tests/config/loopback.yaml"
WORDS = ["a", "red", "blue", "dog", "cat", "house", "on", "under", "near", "the", "small", "large"]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(CONFIG, ROOT)


def jpeg(rng: random.Random, broken: bool = False) -> bytes:
    """A picture of two colours; of a broken one the end is missing."""
    image = Image.new("RGB", (rng.randint(40, 80), rng.randint(40, 80)), _colour(rng))
    image.paste(_colour(rng), (8, 8, 32, 32))
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()[: 200 if broken else None]


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def shard(samples: dict[str, dict[str, bytes]]) -> bytes:
    """A tar of `<key>.<kind>`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for key, members in samples.items():
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def cc3m_files(rng: random.Random) -> dict[str, bytes]:
    """Three shards of 80 pairs, among them one broken image."""
    return {
        f"cc3m-train-{number:04d}.tar": shard(
            {
                f"{number:04d}{i:05d}": {
                    "jpg": jpeg(rng, broken=(number, i) == (1, 5)),
                    "txt": sentence(rng, 6).encode(),
                    "json": b"{}",
                }
                for i in range(80)
            }
        )
        for number in range(3)
    }


def benchmark_files(rng: random.Random, answer, *splits: str) -> dict[str, bytes]:
    """One shard of 30 images a split in the layout of clip-benchmark."""
    files = {}
    for split in splits:
        samples = {f"s{i:07d}": {"jpg": jpeg(rng)} | answer(i) for i in range(30)}
        files |= {f"{split}/nshards.txt": b"1", f"{split}/0.tar": shard(samples)}
    return files


def urban1k(rng: random.Random) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for i in range(1, 31):
            archive.writestr(f"Urban1k/image/{i}.jpg", jpeg(rng))
            archive.writestr(f"Urban1k/caption/{i}.txt", sentence(rng, 40) + "\nmore")
    return data.getvalue()


@pytest.fixture(scope="module")
def hub(study, tmp_path_factory):
    """The repositories that the study names; one shard breaks off once, one fails once."""
    folder, rng = tmp_path_factory.mktemp("hub"), random.Random(0)
    nemo = study.llms["mistral-nemo"].checkpoint
    (folder / "llm").mkdir()
    checkpoints.random("mistral", folder / "llm", layers=2, width=32, heads=2)
    (folder / "llm" / "flame.json").unlink()
    five = [sentence(rng, 8) for _ in range(5)]
    with Loopback() as server:
        server.hub("pixparse/cc3m-wds", cc3m.REVISION, cc3m_files(rng))
        server.hub(
            "clip-benchmark/wds_mscoco_captions",
            "main",
            benchmark_files(rng, lambda i: {"txt": "\n".join(five).encode()}, "test"),
        )
        server.hub(
            "clip-benchmark/wds_food101",
            "main",
            benchmark_files(rng, lambda i: {"cls": str(i % 3).encode()}, "test")
            | {"classnames.txt": b"pizza\nsushi\nramen"},
        )
        server.hub("BeichenZhang/Urban1k", "main", {"Urban1k.zip": urban1k(rng)})
        server.hub(nemo.id, nemo.revision, folder / "llm", kind="model")
        vlm = tiny_vlm.save(folder / "vlm", WORDS)
        server.hub("owner/tiny-vlm", study.captioners["tiny"].revision, vlm, kind="model")
        place = ("pixparse/cc3m-wds", cc3m.REVISION)
        server.fault(server.resolve(*place, "cc3m-train-0000.tar"), cut(2000))
        server.fault(server.resolve(*place, "cc3m-train-0001.tar"), status(503, 1))
        yield server


def run(folder: Path, hub: Loopback) -> subprocess.CompletedProcess[str]:
    home = str(folder / "hf")
    endpoint = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
    with Interpreter(STAGES, endpoint) as jobs:
        return snakemake(folder, CONFIG, "--cores", "2", "results/table6.csv", jobs=jobs)


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, hub)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def test_the_table_has_every_row_and_benchmark(results, study):
    table = pl.read_csv(results / "results/table6.csv")
    assert table["prompts"].to_list() == [1, 3, 5, 7, 9]
    for column in study.tables["table6"].columns:
        values = table[f"{column.benchmark} {column.metric}"]
        assert values.is_between(0, 100).all()


def test_images_came_whole_from_the_pinned_commit_in_spite_of_faults(results, hub):
    manifest = json.loads((results / "resources/datasets/cc3m/manifest.json").read_text())
    assert manifest["commit"] == cc3m.REVISION
    assert (manifest["images"], len(manifest["skipped"])) == (199, 1)
    assert manifest["skipped"][0]["key"] == "000100005"
    for name in ("cc3m-train-0000.tar", "cc3m-train-0001.tar"):
        path = hub.resolve("pixparse/cc3m-wds", cc3m.REVISION, name)
        requests = [r for r in hub.requests if r.path == path]
        assert len(requests) > 2, "a HEAD, a GET, and one of them again after the fault"


def test_every_image_has_both_captions_and_the_report_says_whose(results):
    folder = results / "results/captions/tiny/cc3m"
    captions = pl.read_parquet(folder / "captions.parquet")
    kinds = dict(captions.group_by("kind").len().rows())
    assert kinds == {"raw": 199, "long": 199, "short": 199}
    report = json.loads((folder / "report.json").read_text())
    assert report["images"] == 199
    assert report["captioner"]["revision"] == "c" * 40
    # A random VLM writes nothing sensible, which is seen, and the raw caption stands in.
    assert sum(report["flags"]["long"].values()) > 0


def test_nothing_is_left_to_do(results, hub):
    again = snakemake(results, CONFIG, "--cores", "2", "results/table6.csv")
    assert "Nothing to be done" in again.stdout
