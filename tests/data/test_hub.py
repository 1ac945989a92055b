"""Files of a hub: whatever goes wrong on the way, a file is complete and verified, or not there."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from flame.data import hub, hub_client
from flame.runtime import disk, progress
from tests.loopback import Fault, Loopback, Reply, cut, slow, status, wrong

DATA = bytes(range(256)) * 12_000  # 3 MB: three blocks
SHA256 = hashlib.sha256(DATA).hexdigest()
TOKEN = "hf_neverprinted"
FILES = {
    "README.md": b"a card",
    "train/0.tar": DATA,
    "train/1.tar": DATA[::-1],
    "test/0.tar": b"test" * 1000,
}


@pytest.fixture
def server():
    with Loopback() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch, server, tmp_path):
    monkeypatch.setattr(hub_client, "BACKOFF", 0.01)
    hasty = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100))
    monkeypatch.setattr(huggingface_hub.utils._http, "time", hasty)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def test_files_of_a_hub_that_match_and_no_others(server, tmp_path):
    commit = server.hub("owner/set", "main", FILES)
    assert hub.download("owner/set", "main", ["train/*.tar"], tmp_path / "raw") == tmp_path / "raw"
    assert names(tmp_path / "raw") == ["train/0.tar", "train/1.tar"]
    assert (tmp_path / "raw/train/1.tar").read_bytes() == DATA[::-1]
    source = json.loads((tmp_path / "raw" / hub.SOURCE).read_text())
    assert (source["repo"], source["revision"], source["commit"]) == ("owner/set", "main", commit)
    assert hub.commit_of(tmp_path / "raw") == commit
    assert hub.list_files("owner/set", "main", tmp_path / "raw") == sorted(FILES)
    assert not [path for path in (tmp_path / "raw").rglob("*") if path.is_symlink()]


def test_a_model_of_a_hub(server, tmp_path):
    server.hub("owner/llm", "a" * 40, {"config.json": b"{}"}, kind="model")
    hub.download("owner/llm", "a" * 40, ["*.json"], tmp_path, kind="model")
    assert names(tmp_path) == ["config.json"]


def test_files_that_lie_there_without_a_record_are_checked_and_taken(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    for name, data in (("0.tar", DATA), ("1.tar", b"another")):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(data)
    hub.download("owner/set", "main", ["train/*"], tmp_path)
    fetched = [
        request.path.split("/")[-1] for request in server.requests if "/resolve/" in request.path
    ]
    assert set(fetched) == {"1.tar"}
    assert (tmp_path / "train/1.tar").read_bytes() == DATA[::-1]


def test_bytes_of_xet_are_counted_once(capsys):
    with progress.bar(3, "MB", "fetch") as bar:
        reporter = XetDownloadProgressReporter(
            reconstruction_desc="", total=3_000_000, log_level=30, tqdm_class=hub._counter(bar)
        )
        for done in (1_500_000, 2_000_000, 3_000_000):
            report = SimpleNamespace(
                total_bytes_completed=done,
                total_transfer_bytes_completed=done,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes_completion_rate=1.0,
                total_bytes=3_000_000,
            )
            reporter.update_progress(report)
        reporter.close()
        assert bar.n == 3


def test_what_is_there_is_not_asked_for_again(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    hub.download("owner/set", "main", ["train/0.tar"], tmp_path)
    before = len(server.requests)
    hub.download("owner/set", "main", ["train/0.tar"], tmp_path)
    assert len(server.requests) == before
    hub.download("owner/set", "main", ["train/*"], tmp_path)
    fetched = [request.path for request in server.requests[before:] if request.method == "GET"]
    assert [path.split("/")[-1] for path in fetched] == ["1.tar"]


def test_a_branch_that_moves_on_does_not_mix_two_commits(server, tmp_path):
    old = server.hub("owner/set", "main", FILES)
    hub.download("owner/set", "main", ["train/0.tar"], tmp_path)
    server.hub("owner/set", "b" * 40, {"train/1.tar": b"new"})
    server._repos["datasets", "owner/set", "main"] = server._repos[
        "datasets", "owner/set", "b" * 40
    ]
    hub.download("owner/set", "main", ["train/1.tar"], tmp_path)
    assert (tmp_path / "train/1.tar").read_bytes() == FILES["train/1.tar"]
    assert hub.commit_of(tmp_path) == old


def test_another_revision_is_not_mixed_in(server, tmp_path):
    server.hub("owner/set", "a" * 40, FILES)
    hub.download("owner/set", "a" * 40, ["train/*"], tmp_path)
    server.hub("owner/set", "b" * 40, {"train/0.tar": b"new"})
    with pytest.raises(ValueError, match=r"holds dataset 'owner/set' at 'aa.*: delete it first"):
        hub.download("owner/set", "b" * 40, ["train/*"], tmp_path)
    assert (tmp_path / "train/0.tar").read_bytes() == DATA


def test_a_deleted_or_shortened_file_is_fetched_again(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    hub.download("owner/set", "main", ["train/*"], tmp_path)
    (tmp_path / "train/0.tar").unlink()
    (tmp_path / "train/1.tar").write_bytes(b"half")
    hub.download("owner/set", "main", ["train/*"], tmp_path)
    assert (tmp_path / "train/0.tar").read_bytes() == DATA
    assert (tmp_path / "train/1.tar").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("name", ["train/0.tar", "README.md"])
def test_wrong_bytes_of_a_hub_are_deleted(server, tmp_path, name):
    commit = server.hub("owner/set", "main", FILES)
    path = server.resolve("owner/set", commit, name)
    server.fault(path, wrong(b"?" * len(FILES[name]), times=1))
    with pytest.raises(ValueError, match=rf"{name} of 'owner/set' has checksum .* hub lists"):
        hub.download("owner/set", "main", [name], tmp_path)
    assert names(tmp_path) == []
    hub.download("owner/set", "main", [name], tmp_path)
    assert (tmp_path / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(
    "faults",
    [
        [status(503, times=2)],
        [status(429, times=1, retry_after=0)],
        [Fault(lambda _: Reply(500), times=2, methods=("GET",))],
        [cut(1_000_000), cut(1_000_000)],
    ],
    ids=["503", "429", "500 after a good HEAD", "cut"],
)
def test_a_hub_that_stumbles(server, tmp_path, faults):
    commit = server.hub("owner/set", "main", FILES)
    server.fault(server.resolve("owner/set", commit, "train/0.tar"), *faults)
    server.fault("/api/datasets/owner/set/revision/main", status(500, times=2))
    hub.download("owner/set", "main", ["train/0.tar"], tmp_path)
    assert (tmp_path / "train/0.tar").read_bytes() == DATA


@pytest.mark.parametrize(
    ("gated", "token", "works"),
    [(True, None, False), (TOKEN, None, False), (TOKEN, "hf_other", False), (TOKEN, TOKEN, True)],
)
def test_a_gated_set_says_what_to_do_and_never_the_token(
    server, tmp_path, monkeypatch, caplog, gated, token, works
):
    server.hub("owner/gated", "main", FILES, gated=gated)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if works:
        hub.download("owner/gated", "main", ["test/*"], tmp_path)
        assert names(tmp_path) == ["test/0.tar"]
    else:
        with pytest.raises(ValueError, match="'owner/gated' is gated: request access") as error:
            hub.download("owner/gated", "main", ["test/*"], tmp_path)
        assert "hf_" not in str(error.value)
        assert "\n" not in str(error.value)
    assert "hf_" not in caplog.text
    assert TOKEN not in (tmp_path / hub.SOURCE).read_text()


def test_a_gated_set_of_which_something_lies_there_is_not_taken_for_whole(server, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/0.tar").write_bytes(b"half")
    server.hub("owner/gated", "main", FILES, gated=True)
    with pytest.raises(ValueError, match="is gated"):
        hub.download("owner/gated", "main", ["test/*"], tmp_path)


def test_a_private_set_is_seen_with_its_token_only(server, tmp_path, monkeypatch):
    server.hub("owner/private", "main", FILES, private=TOKEN)
    with pytest.raises(ValueError, match=r"no dataset 'owner/private', .*HF_TOKEN is not set"):
        hub.download("owner/private", "main", ["test/*"], tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"no dataset 'owner/private', .*HF_TOKEN is set, but"):
        hub.download("owner/private", "main", ["test/*"], tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.download("owner/private", "main", ["test/*"], tmp_path)
    assert names(tmp_path) == ["test/0.tar"]


@pytest.mark.parametrize(
    ("repo", "revision", "pattern", "words"),
    [
        ("owner/sett", "main", "*", "no dataset 'owner/sett'"),
        ("owner/set", "c" * 40, "*", "'owner/set' has no revision 'cccc"),
        ("owner/set", "main", "trian/*", r"has no file 'trian/\*'.*train/0.tar"),
    ],
)
def test_what_is_not_there_is_named(server, tmp_path, repo, revision, pattern, words):
    server.hub("owner/set", "main", FILES)
    with pytest.raises(ValueError, match=words) as error:
        hub.download(repo, revision, [pattern], tmp_path)
    assert "\n" not in str(error.value)


def test_no_network_is_one_line_and_keeps_what_came(server, tmp_path, monkeypatch):
    server.hub("owner/set", "main", FILES)
    hub.download("owner/set", "main", ["train/0.tar"], tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.download("owner/set", "main", ["train/0.tar"], tmp_path)
    for pattern in ("train/1.tar", "test/*"):
        with pytest.raises(ValueError, match=r"127\.0\.0\.1:9.*kept in .*, run again") as error:
            hub.download("owner/set", "main", [pattern], tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        hub.download("owner/other", "main", ["*"], tmp_path / "other")
    assert names(tmp_path) == ["train/0.tar"]


def test_a_hub_that_stays_down(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    server.fault("/api/datasets/owner/set/revision/main", status(502))
    with pytest.raises(ValueError, match=r"cannot fetch 'owner/set' from .*502"):
        hub.download("owner/set", "main", ["*"], tmp_path)


def test_a_hub_that_is_none(server, tmp_path):
    server.route(
        "/api/datasets/owner/set/revision/main", lambda _: Reply(200, b"<html>log in</html>")
    )
    with pytest.raises(ValueError, match="does not answer like a hub: check HF_ENDPOINT"):
        hub.download("owner/set", "main", ["*"], tmp_path)


def test_a_killed_job_leaves_nothing_that_is_taken_for_whole(server, tmp_path):
    commit = server.hub("owner/set", "main", FILES)
    server.fault(server.resolve("owner/set", commit, "train/1.tar"), slow(30, times=2))
    code = (
        "from flame.data import hub; from pathlib import Path;"
        f"hub.download('owner/set', 'main', ['train/*'], Path({str(tmp_path)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(hub.__file__).parents[2])}
    job = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "train/0.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert names(tmp_path) == ["train/0.tar"]
    server._faults.clear()
    before = len(server.requests)
    hub.download("owner/set", "main", ["train/*"], tmp_path)
    assert (tmp_path / "train/1.tar").read_bytes() == DATA[::-1]
    assert "/train/0.tar" not in " ".join(
        request.path for request in server.requests[before:] if request.method == "GET"
    )
    assert not list((tmp_path / ".cache").rglob("*.incomplete"))


def test_two_jobs_at_once_fetch_one_file_once(server, tmp_path):
    commit = server.hub("owner/set", "main", FILES)
    path = server.resolve("owner/set", commit, "train/0.tar")
    server.fault(path, slow(0.3))
    jobs = [
        threading.Thread(target=hub.download, args=("owner/set", "main", ["train/0.tar"], tmp_path))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(server.asked(path)) == 1


def test_the_loopback_hub_answers_as_its_client_expects(server, tmp_path):
    commit = server.hub("owner/set", "main", FILES)
    api = HfApi(endpoint=server.url)
    info = api.dataset_info("owner/set")
    assert (info.sha, [file.rfilename for file in info.siblings]) == (commit, sorted(FILES))
    assert [entry.path for entry in api.list_repo_tree("owner/set", repo_type="dataset")] == [
        "README.md",
        "test",
        "train",
    ]
    found = api.get_paths_info("owner/set", ["train/0.tar"], repo_type="dataset")
    assert (found[0].size, found[0].lfs.sha256) == (len(DATA), SHA256)
    assert api.file_exists("owner/set", "README.md", repo_type="dataset")
    assert not api.file_exists("owner/set", "readme", repo_type="dataset")


def test_too_little_disk_is_refused_before_anything_is_fetched(server, tmp_path, monkeypatch):
    server.hub("owner/set", "main", FILES)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="no room"):
        hub.download("owner/set", "main", ["train/*"], tmp_path)
    assert names(tmp_path) == []


def test_optional_patterns_may_match_nothing(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    hub.download("owner/set", "main", ["test/*"], tmp_path, optional=["README*", "LICENSE*"])
    assert names(tmp_path) == ["README.md", "test/0.tar"]


def test_forgetting_leaves_only_the_files(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    hub.download("owner/set", "main", ["test/*"], tmp_path / "raw")
    hub.forget(tmp_path / "raw")
    found = [path for path in (tmp_path / "raw").rglob("*") if path.is_file()]
    assert found == [tmp_path / "raw/test/0.tar"]


# --- a cache ------------------------------------------------------------------------------------


def test_a_cached_commit_needs_no_network_once_it_is_complete(server, tmp_path, monkeypatch):
    server.hub("owner/llm", "a" * 40, {"config.json": b"{}"}, kind="model")
    folder = hub.cached("owner/llm", "a" * 40, ["*.json"])
    assert folder.is_relative_to(tmp_path / "home")
    assert names(folder) == ["config.json"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.cached("owner/llm", "a" * 40, ["*.json"]) == folder
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        hub.cached("owner/llm", "b" * 40, ["*.json"])


def test_a_cached_branch_is_looked_up_again_and_works_without_network(server, monkeypatch, caplog):
    server.hub("owner/llm", "main", {"config.json": b"{}"}, kind="model")
    old = hub.cached("owner/llm", None, ["*.json"])
    server.hub("owner/llm", "b" * 40, {"config.json": b"[]"}, kind="model")
    server._repos["models", "owner/llm", "main"] = server._repos["models", "owner/llm", "b" * 40]
    new = hub.cached("owner/llm", None, ["*.json"])
    assert ((old / "config.json").read_bytes(), (new / "config.json").read_bytes()) == (
        b"{}",
        b"[]",
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.cached("owner/llm", "main", ["*.json"]) == new
    assert "using the last known commit of main" in caplog.text
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        hub.cached("owner/llm", "other", ["*.json"])


@pytest.mark.parametrize("broken", [None, "config.json", "tokenizer.model.bin"])
def test_what_a_library_cached_is_verified(server, tmp_path, monkeypatch, broken):
    files = {"config.json": b'{"a": 1}', "tokenizer.model.bin": b"pieces"}
    commit = server.hub("owner/llm", "main", files, kind="model")
    if broken:
        path = server.resolve("owner/llm", commit, broken, kind="model")
        for at in (path, server.resolve("owner/llm", "main", broken, kind="model")):
            server.fault(at, wrong(b"?" * len(files[broken]), times=1))
    cache = tmp_path / "cache"
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    for name in files:
        huggingface_hub.hf_hub_download(
            "owner/llm", name, cache_dir=cache, endpoint=server.url, revision="main"
        )
    hub.verify_cache("owner/other")
    if not broken:
        hub.verify_cache("owner/llm")
        return
    with pytest.raises(ValueError, match=rf"{broken} of 'owner/llm' has checksum .* was deleted"):
        hub.verify_cache("owner/llm")
    assert [path.read_bytes() for path in cache.rglob("blobs/*")] == [
        data for name, data in files.items() if name != broken
    ]
    hub.verify_cache("owner/llm")


def test_a_refused_upload_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "export.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.fault("/api/repos/create", status(403))
    with pytest.raises(ValueError, match=r"cannot upload 'owner/flame'") as error:
        hub.upload(tmp_path, "owner/flame", private=True, message="Trained")
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
