"""Fixtures of the fault tests: a reference run of all stages, and a count of interruptions."""

import json
import random
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.faults import stages
from tests.faults.stages import Bench, Reference, Stage
from tests.loopback import Loopback, Reply, Request
from tests.preloaded import STAGES, Preloaded

HEADER = ("stage", "by clock", "by step", "SIGTERM", "no room", "went on", "was done")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=0, help="kills per stage, instead of a few")


class Tally:
    """How the interrupted runs of every stage ended."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def add(self, stage: str, what: str) -> None:
        row = self.counts.setdefault(stage, dict.fromkeys(HEADER[1:], 0))
        row[what] += 1


TALLY = Tally()


@pytest.fixture(scope="session")
def tally() -> Tally:
    return TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With --kills, print a table of all interruptions."""
    if not TALLY.counts or not terminalreporter.config.getoption("--kills", 0):
        return
    rows = [HEADER, *((name, *map(str, row.values())) for name, row in TALLY.counts.items())]
    total = [sum(row[what] for row in TALLY.counts.values()) for what in HEADER[1:]]
    rows.append(("all", *map(str, total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("interruptions")
    for name, *counts in rows:
        numbers = [text.rjust(width) for text, width in zip(counts, widths[1:], strict=True)]
        terminalreporter.write_line("  ".join([name.ljust(widths[0]), *numbers]))


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """Kills per stage; 0 means the few that fit into a plain test run."""
    return request.config.getoption("--kills", 0)


@pytest.fixture(scope="session")
def server() -> Iterator[Loopback]:
    """A server with a hub, web archives and a captioner."""
    with Loopback() as server:
        server.route("/v1/chat/completions", _describe)
        yield server


@pytest.fixture(scope="session")
def preloaded(server: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    home = tmp_path_factory.mktemp("home")
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": ""}
    with Preloaded(STAGES, hub) as preloaded:
        yield preloaded


@pytest.fixture(scope="session")
def study(server: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of these tests, with the captioner of `server`."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(stages.STUDY.read_text().replace("http://127.0.0.1:1", server.url))
    return path


@pytest.fixture(scope="session")
def reference(
    server: Loopback, preloaded: Preloaded, study: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Results of all stages, run without faults."""
    folder = tmp_path_factory.mktemp("reference")
    server.hub("owner/llm", "main", folder / "resources/llms/random-llama", kind="model")
    return stages.make(preloaded, study, folder, _downloads(server))


@pytest.fixture
def draws(request: pytest.FixtureRequest) -> random.Random:
    """A random generator, seeded with the name of the test."""
    return random.Random(request.node.name)


def _describe(request: Request) -> Reply:
    """A caption that depends only on the request."""
    seed = json.loads(request.body)["seed"]
    message = {"content": f"A thing of kind {seed} beside another one."}
    choice = {"message": message, "finish_reason": "stop"}
    return Reply(200, json.dumps({"choices": [choice]}).encode())


# Downloads.


def _downloads(server: Loopback) -> list[Stage]:
    """Stages that download: pairs and an LLM from a hub, archives from the web."""
    shards = {f"cc3m-train-{n:04d}.tar": _tar(_pairs(10 * n, 10)) for n in range(4)}
    server.hub("owner/pairs", "main", shards)
    hub = {"id": "owner/pairs", "revision": "main", "limit": 40}
    checkpoint = {"source": "hub", "id": "owner/llm", "revision": "main"}
    return [
        _dataset("hub", "cc3m", hub),
        _dataset("archives", "crossmodal3600", _archives(server)),
        Stage(
            "download_llm hub",
            "flame.download",
            ("llm", "--checkpoint", json.dumps(checkpoint), "--out", "resources/llms/hub"),
            ("resources/llms/hub",),
        ),
    ]


def _dataset(name: str, source: str, options: dict[str, object]) -> Stage:
    out = f"resources/datasets/{name}"
    arguments = ("--source", source, "--options", json.dumps(options), "--seed", "0", "--out", out)
    return Stage(f"download_dataset {name}", "flame.download", ("dataset", *arguments), (out,))


def _pairs(first: int, count: int) -> dict[str, bytes]:
    """Images and captions in the layout of WebDataset."""
    files = {}
    for i in range(first, first + count):
        files |= {f"{i:09d}.jpg": _picture(i), f"{i:09d}.txt": b"caption %d" % i}
    return files


def _archives(server: Loopback) -> dict[str, object]:
    """URLs and digests of captions and images, as Crossmodal-3600 publishes them."""
    keys = [f"{i:04d}" for i in range(20)]
    lines = [{"image/key": key, "en": {"caption": [f"caption {key}"]}} for key in keys]
    texts = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {"captions": _tar({"captions.jsonl": texts})}
    files["images"] = _tar({f"{key}.jpg": _picture(int(key)) for key in keys})
    urls = {name: server.file(f"/{name}.tar", data) for name, data in files.items()}
    sums = {f"{name}_sha256": sha256(data).hexdigest() for name, data in files.items()}
    return urls | sums | {"limit": len(keys)}


def _picture(seed: int) -> bytes:
    data = BytesIO()
    noise = random.Random(seed).randbytes(24 * 16 * 3)
    Image.frombytes("RGB", (24, 16), noise).save(data, "JPEG")
    return data.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return data.getvalue()


@pytest.fixture
def bench(request, preloaded: Preloaded, reference: Reference, tmp_path: Path) -> Bench:
    """The stage under test."""
    return Bench(preloaded, reference, request.param, tmp_path / "bench")
