"""Whatever is fetched from a hub is verified and retried, whoever fetches it.

A file of the right size with wrong bytes is refused, deleted and fetched again by the next run; it
never becomes an output. A hub that fails after it has announced a file is asked again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from flame import download
from flame.captioning import engines, published
from flame.captioning.engines.base import model_folder
from flame.data import hub_client
from flame.data.datasets import _published
from flame.embedding import checkpoints
from flame.evaluation import encoder
from flame.runtime.checksums import verify
from flame.study.schema.data import PublishedCaptions, TransformersCaptioner
from flame.study.schema.llms import HubCheckpoint
from flame.study.schema.runs import OpenClipTower, TransformersTower
from tests import tiny_vlm
from tests.loopback import Fault, Loopback, Reply, wrong
from tests.towers.test_pretrained import TEXT, VISION, chinese_clip, settings
from tests.towers.test_released import release_settings, release_weights

REVISION = "a" * 40


@dataclass
class User:
    """Somebody who fetches from a hub.

    Args:
        files: folder with what the hub has.
        broken: name of the file that arrives broken.
        run: fetches, and returns what must hold the right bytes.
        kind: of the repository.
        repo: its name.
        output: what must not exist after a failure.
    """

    files: Path
    broken: str
    run: Callable[[], Path]
    kind: str = "model"
    repo: str = "owner/name"
    output: Path | None = None


def data_set(folder: Path, monkeypatch) -> User:
    (folder / "hub").mkdir()
    (folder / "hub/0.tar").write_bytes(bytes(range(256)) * 100)
    options = _published.OnHub(id="owner/name", revision=REVISION)
    return User(
        folder / "hub",
        "0.tar",
        lambda: _published.files_of(options, folder / "raw", "*.tar") / "0.tar",
        kind="dataset",
    )


def llm(folder: Path, monkeypatch) -> User:
    checkpoints.random("llama", folder / "hub")
    for name in ("flame.json", "SHA256SUMS"):
        (folder / "hub" / name).unlink()
    out = folder / "llms/tiny"
    checkpoint = HubCheckpoint(source="hub", id="owner/name", revision=REVISION)

    def run() -> Path:
        download.llm(checkpoint, out)
        verify(out)
        names = {path.name for path in out.iterdir()}
        assert names == {p.name for p in (folder / "hub").iterdir()} | {"flame.json", "SHA256SUMS"}
        return out / "model.safetensors"

    return User(folder / "hub", "model.safetensors", run, output=out)


def captions(folder: Path, monkeypatch) -> User:
    (folder / "hub").mkdir()
    rows = [{"key": f"p{i}", "text": "A red apple lies on a table."} for i in range(100)]
    (folder / "hub/long.json").write_text(json.dumps(rows))
    pl.DataFrame({"key": ["p1"]}).write_parquet(folder / "index.parquet")
    captioner = PublishedCaptions(
        engine="published",
        id="owner/name",
        revision=REVISION,
        files={"long": "long.json"},
        key="key",
        text="text",
    )
    (folder / "out").mkdir()

    def run() -> Path:
        published.adopt(captioner, folder, folder / "out")
        (chunk,) = folder.glob("out/chunk-*.parquet")
        assert pl.read_parquet(chunk)["text"].to_list() == [rows[1]["text"]]
        return folder / "out/hub/long.json"

    output = folder / "out/chunk-00000.parquet"
    return User(folder / "hub", "long.json", run, kind="dataset", output=output)


def captioner(folder: Path, monkeypatch) -> User:
    tiny_vlm.save(folder / "hub")
    asked = TransformersCaptioner(
        engine="transformers",
        id="owner/name",
        revision=REVISION,
        prompts={"long": "?"},
        max_tokens={"long": 4},
    )

    def run() -> Path:
        engine = engines.create(asked)
        engine.close()
        return Path(engine._model.name_or_path) / "model.safetensors"

    return User(folder / "hub", "model.safetensors", run)


def captioner_with_code(folder: Path, monkeypatch) -> User:
    """As vLLM is given it."""
    tiny_vlm.save(folder / "hub")
    (folder / "hub/modeling.py").write_text("raise RuntimeError\n")

    def run() -> Path:
        found = model_folder("owner/name", REVISION, with_code=True)
        assert (found / "tokenizer.json").exists()
        return found / "modeling.py"

    return User(folder / "hub", "modeling.py", run)


def export(folder: Path, monkeypatch) -> User:
    (folder / "hub").mkdir()
    save_file({"a": torch.ones(100)}, folder / "hub/model.safetensors")
    (folder / "hub/export.json").write_text("{}")
    monkeypatch.setattr(encoder, "Flame", lambda folder, *rest: folder)
    return User(
        folder / "hub",
        "model.safetensors",
        lambda: encoder.load("owner/name", revision=REVISION) / "model.safetensors",
    )


def llm_of_an_export(folder: Path, monkeypatch) -> User:
    checkpoints.random("llama", folder / "hub")
    monkeypatch.setattr(encoder, "FrozenLLM", lambda folder, options, device: folder)

    def run() -> Path:
        model = encoder.Flame.__new__(encoder.Flame)
        model._folder, model._llm_folder, model.device = folder, None, "cpu"
        checkpoint = HubCheckpoint(source="hub", id="owner/name", revision=REVISION)
        model.settings = SimpleNamespace(checkpoint=checkpoint)
        return model.llm / "model.safetensors"

    return User(folder / "hub", "model.safetensors", run)


def tower_of_open_clip(folder: Path, monkeypatch) -> User:
    (folder / "hub").mkdir()
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny-hub.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hub.json")
    torch.manual_seed(0)
    own = open_clip.create_model("tiny-hub")
    save_file(own.state_dict(), folder / "hub/open_clip_model.safetensors")
    mean = (0.5, 0.25, 0.125)
    tag = {"hf_hub": "owner/name/", "url": "", "mean": mean, "std": mean}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-hub", {"ours": tag})
    tower = OpenClipTower(source="open_clip", name="tiny-hub", tag="ours")
    out = folder / "towers/tiny"

    def run() -> Path:
        download.tower(settings(tower), out)
        verify(out)
        assert "file" not in tag
        written = json.loads((out / "open_clip_config.json").read_text())
        assert written["preprocess_cfg"]["mean"] == [*mean]
        there = open_clip.create_model(f"local-dir:{out}").state_dict()
        assert all(torch.equal(there[name], value) for name, value in own.state_dict().items())
        assert not (out / "hub").exists()
        return folder / "hub/open_clip_model.safetensors"

    return User(folder / "hub", "open_clip_model.safetensors", run, output=out)


def tower_of_transformers(folder: Path, monkeypatch) -> User:
    chinese_clip(folder / "hub")
    tower = TransformersTower(source="transformers", id="owner/name", revision=REVISION)
    out = folder / "towers/tiny"

    def run() -> Path:
        download.tower(settings(tower), out)
        verify(out)
        assert not (out / "hub").exists()
        return out / "model.safetensors"

    return User(folder / "hub", "model.safetensors", run, output=out)


def tower_of_the_release(folder: Path, monkeypatch) -> User:
    (folder / "hub").mkdir()
    release_weights(folder / "hub/flame.pt")
    out = folder / "towers/release"
    weights = {"id": "owner/name", "revision": REVISION, "file": "flame.pt"}
    released = release_settings()
    released = released.model_validate(released.model_dump() | {"weights": weights})

    def run() -> Path:
        download.tower(released, out)
        verify(out)
        return folder / "raw/towers/release/flame.pt"

    return User(folder / "hub", "flame.pt", run, output=out)


USERS = [
    data_set,
    llm,
    captions,
    captioner,
    captioner_with_code,
    export,
    llm_of_an_export,
    tower_of_open_clip,
    tower_of_transformers,
    tower_of_the_release,
]


@pytest.fixture(params=USERS, ids=lambda make: make.__name__)
def user(request, tmp_path, monkeypatch):
    return request.param(tmp_path, monkeypatch)


@pytest.fixture
def server(user, monkeypatch, tmp_path):
    monkeypatch.setattr(hub_client, "BACKOFF", 0.01)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Loopback() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        commit = server.hub(user.repo, REVISION, user.files, kind=user.kind)
        server.hub(user.repo, "main", user.files, kind=user.kind)
        server.broken = [
            server.resolve(user.repo, c, user.broken, kind=user.kind)
            for c in (commit, server._repos[f"{user.kind}s", user.repo, "main"].commit)
        ]
        yield server


def test_wrong_bytes_of_the_right_size_are_refused_and_fetched_again(user, server, tmp_path):
    right = (user.files / user.broken).read_bytes()
    flipped = np.frombuffer(right, np.uint8).copy()
    flipped[len(flipped) // 2] ^= 1
    for path in server.broken:
        server.fault(path, wrong(flipped.tobytes(), times=1))
    with pytest.raises(ValueError, match=rf"{user.broken} of 'owner/name' has checksum") as error:
        user.run()
    assert "\n" not in str(error.value)
    assert user.output is None or not user.output.exists()
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in found if path.read_bytes() == flipped.tobytes()]
    assert user.run().read_bytes() == right


def test_a_500_after_a_good_head_is_retried(user, server):
    for path in server.broken:
        server.fault(path, Fault(lambda _: Reply(500), times=2, methods=("GET",)))
    assert user.run().read_bytes() == (user.files / user.broken).read_bytes()
