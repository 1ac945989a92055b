"""Bytes from elsewhere: whatever goes wrong on the way, a file is whole and right, or not there."""

import errno
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from flame.data import fetch
from flame.runtime import progress
from loopback import Fault, Loopback, Reply, cut, html, slow, status, without_range, wrong

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
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
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


# --- a hub ------------------------------------------------------------------------------------


def test_files_of_a_hub_that_match_and_no_others(server, tmp_path):
    commit = server.hub("owner/set", "main", FILES)
    assert fetch.hub("owner/set", "main", ["train/*.tar"], tmp_path / "raw") == tmp_path / "raw"
    assert names(tmp_path / "raw") == ["train/0.tar", "train/1.tar"]
    assert (tmp_path / "raw/train/1.tar").read_bytes() == DATA[::-1]
    source = json.loads((tmp_path / "raw" / fetch.SOURCE).read_text())
    assert (source["repo"], source["revision"], source["commit"]) == ("owner/set", "main", commit)
    assert fetch.commit(tmp_path / "raw") == commit
    assert fetch.hub_files("owner/set", "main", tmp_path / "raw") == sorted(FILES)
    assert not [path for path in (tmp_path / "raw").rglob("*") if path.is_symlink()]


def test_a_model_of_a_hub(server, tmp_path):
    server.hub("owner/llm", "a" * 40, {"config.json": b"{}"}, kind="model")
    fetch.hub("owner/llm", "a" * 40, ["*.json"], tmp_path, kind="model")
    assert names(tmp_path) == ["config.json"]


def test_files_that_lie_there_without_a_record_are_checked_and_taken(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    for name, data in (("0.tar", DATA), ("1.tar", b"another")):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(data)
    fetch.hub("owner/set", "main", ["train/*"], tmp_path)
    fetched = [
        request.path.split("/")[-1] for request in server.requests if "/resolve/" in request.path
    ]
    assert set(fetched) == {"1.tar"}
    assert (tmp_path / "train/1.tar").read_bytes() == DATA[::-1]


def test_bytes_of_xet_are_counted_once(capsys):
    with progress.bar(3, "MB", "fetch") as bar:
        reporter = XetDownloadProgressReporter(
            reconstruction_desc="", total=3_000_000, log_level=30, tqdm_class=fetch._counter(bar)
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
    fetch.hub("owner/set", "main", ["train/0.tar"], tmp_path)
    before = len(server.requests)
    fetch.hub("owner/set", "main", ["train/0.tar"], tmp_path)
    assert len(server.requests) == before
    fetch.hub("owner/set", "main", ["train/*"], tmp_path)
    fetched = [request.path for request in server.requests[before:] if request.method == "GET"]
    assert [path.split("/")[-1] for path in fetched] == ["1.tar"]


def test_a_branch_that_moves_on_does_not_mix_two_commits(server, tmp_path):
    old = server.hub("owner/set", "main", FILES)
    fetch.hub("owner/set", "main", ["train/0.tar"], tmp_path)
    server.hub("owner/set", "b" * 40, {"train/1.tar": b"new"})
    server._repos["datasets", "owner/set", "main"] = server._repos[
        "datasets", "owner/set", "b" * 40
    ]
    fetch.hub("owner/set", "main", ["train/1.tar"], tmp_path)
    assert (tmp_path / "train/1.tar").read_bytes() == FILES["train/1.tar"]
    assert fetch.commit(tmp_path) == old


def test_another_revision_is_not_mixed_in(server, tmp_path):
    server.hub("owner/set", "a" * 40, FILES)
    fetch.hub("owner/set", "a" * 40, ["train/*"], tmp_path)
    server.hub("owner/set", "b" * 40, {"train/0.tar": b"new"})
    with pytest.raises(ValueError, match=r"holds dataset 'owner/set' at 'aa.*: delete it first"):
        fetch.hub("owner/set", "b" * 40, ["train/*"], tmp_path)
    assert (tmp_path / "train/0.tar").read_bytes() == DATA


def test_a_deleted_or_shortened_file_is_fetched_again(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    fetch.hub("owner/set", "main", ["train/*"], tmp_path)
    (tmp_path / "train/0.tar").unlink()
    (tmp_path / "train/1.tar").write_bytes(b"half")
    fetch.hub("owner/set", "main", ["train/*"], tmp_path)
    assert (tmp_path / "train/0.tar").read_bytes() == DATA
    assert (tmp_path / "train/1.tar").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("name", ["train/0.tar", "README.md"])
def test_wrong_bytes_of_a_hub_are_deleted(server, tmp_path, name):
    commit = server.hub("owner/set", "main", FILES)
    path = server.resolve("owner/set", commit, name)
    server.fault(path, wrong(b"?" * len(FILES[name]), times=1))
    with pytest.raises(ValueError, match=rf"{name} of 'owner/set' has checksum .* hub lists"):
        fetch.hub("owner/set", "main", [name], tmp_path)
    assert names(tmp_path) == []
    fetch.hub("owner/set", "main", [name], tmp_path)
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
    fetch.hub("owner/set", "main", ["train/0.tar"], tmp_path)
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
        fetch.hub("owner/gated", "main", ["test/*"], tmp_path)
        assert names(tmp_path) == ["test/0.tar"]
    else:
        with pytest.raises(ValueError, match="'owner/gated' is gated: ask for access") as error:
            fetch.hub("owner/gated", "main", ["test/*"], tmp_path)
        assert "hf_" not in str(error.value)
        assert "\n" not in str(error.value)
    assert "hf_" not in caplog.text
    assert TOKEN not in (tmp_path / fetch.SOURCE).read_text()


def test_a_gated_set_of_which_something_lies_there_is_not_taken_for_whole(server, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/0.tar").write_bytes(b"half")
    server.hub("owner/gated", "main", FILES, gated=True)
    with pytest.raises(ValueError, match="is gated"):
        fetch.hub("owner/gated", "main", ["test/*"], tmp_path)


def test_a_private_set_is_seen_with_its_token_only(server, tmp_path, monkeypatch):
    server.hub("owner/private", "main", FILES, private=TOKEN)
    with pytest.raises(ValueError, match=r"no dataset 'owner/private', .*HF_TOKEN is not set"):
        fetch.hub("owner/private", "main", ["test/*"], tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"no dataset 'owner/private', .*HF_TOKEN is set, but"):
        fetch.hub("owner/private", "main", ["test/*"], tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch.hub("owner/private", "main", ["test/*"], tmp_path)
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
        fetch.hub(repo, revision, [pattern], tmp_path)
    assert "\n" not in str(error.value)


def test_no_network_is_one_line_and_keeps_what_came(server, tmp_path, monkeypatch):
    server.hub("owner/set", "main", FILES)
    fetch.hub("owner/set", "main", ["train/0.tar"], tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fetch.hub("owner/set", "main", ["train/0.tar"], tmp_path)
    for pattern in ("train/1.tar", "test/*"):
        with pytest.raises(ValueError, match=r"127\.0\.0\.1:9.*kept in .*, run again") as error:
            fetch.hub("owner/set", "main", [pattern], tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        fetch.hub("owner/other", "main", ["*"], tmp_path / "other")
    assert names(tmp_path) == ["train/0.tar"]


def test_a_hub_that_stays_down(server, tmp_path):
    server.hub("owner/set", "main", FILES)
    server.fault("/api/datasets/owner/set/revision/main", status(502))
    with pytest.raises(ValueError, match=r"cannot fetch 'owner/set' from .*502"):
        fetch.hub("owner/set", "main", ["*"], tmp_path)


def test_a_hub_that_is_none(server, tmp_path):
    server.route(
        "/api/datasets/owner/set/revision/main", lambda _: Reply(200, b"<html>log in</html>")
    )
    with pytest.raises(ValueError, match="does not answer as a hub does: see HF_ENDPOINT"):
        fetch.hub("owner/set", "main", ["*"], tmp_path)


def test_a_killed_job_leaves_nothing_that_is_taken_for_whole(server, tmp_path):
    commit = server.hub("owner/set", "main", FILES)
    server.fault(server.resolve("owner/set", commit, "train/1.tar"), slow(30, times=2))
    code = (
        "from flame.data import fetch; from pathlib import Path;"
        f"fetch.hub('owner/set', 'main', ['train/*'], Path({str(tmp_path)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fetch.__file__).parents[2])}
    job = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "train/0.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert names(tmp_path) == ["train/0.tar"]
    server._faults.clear()
    before = len(server.requests)
    fetch.hub("owner/set", "main", ["train/*"], tmp_path)
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
        threading.Thread(target=fetch.hub, args=("owner/set", "main", ["train/0.tar"], tmp_path))
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


# --- the web ------------------------------------------------------------------------------------


def test_a_file_of_the_web(server, tmp_path):
    url = server.file("/some/a%20set.zip", DATA)
    server._routes["/some/a set.zip"] = server._routes.pop("/some/a%20set.zip")
    path = fetch.archive(url + "?download=1", tmp_path, SHA256, len(DATA))
    assert path == tmp_path / "a set.zip"
    assert path.read_bytes() == DATA
    assert names(tmp_path) == ["a set.zip"]


def test_a_file_that_is_there_is_checked_and_not_fetched(server, tmp_path):
    (tmp_path / "set.zip").write_bytes(DATA)
    fetch.archive(f"{server.url}/set.zip", tmp_path, SHA256)
    with pytest.raises(ValueError, match=f"is another file: delete it.*{SHA256}, {'0' * 64} is"):
        fetch.archive(f"{server.url}/set.zip", tmp_path, "0" * 64)
    assert (tmp_path / "set.zip").exists()
    assert server.requests == []


@pytest.mark.parametrize(
    "faults",
    [
        [status(429, times=1, retry_after=0)],
        [status(500, times=2), status(503, times=2)],
        [cut(1_500_000), cut(500_000), cut(10), status(502, times=1)],
        [cut(0)],
        [cut(1_500_000), without_range(times=1)],
    ],
    ids=["429", "5xx", "cut", "cut at once", "no range"],
)
def test_a_server_that_stumbles(server, tmp_path, faults):
    url = server.file("/set.zip", DATA, faults=faults)
    assert fetch.archive(url, tmp_path, SHA256).read_bytes() == DATA
    assert names(tmp_path) == ["set.zip"]


def test_it_waits_as_long_as_the_server_asks(server, tmp_path):
    url = server.file("/set.zip", DATA, faults=[status(429, times=1, retry_after=1)])
    start = time.monotonic()
    fetch.archive(url, tmp_path)
    assert 1 <= time.monotonic() - start < 5


def test_only_the_rest_is_fetched(server, tmp_path):
    url = server.file("/set.zip", DATA, faults=[cut(2_000_000)])
    fetch.archive(url, tmp_path, SHA256)
    first, second = server.asked("/set.zip")
    assert "range" not in first.headers
    assert int(second.headers["range"][6:-1]) > 1_000_000


def test_a_job_that_was_killed_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 1)
    url = server.file("/set.zip", DATA, faults=[cut(2_000_000), *[status(500)]])
    with pytest.raises(OSError, match=r"busy \(500\)"):
        fetch.archive(url, tmp_path)
    assert names(tmp_path) == ["set.zip.partial", "set.zip.partial.tag"]
    server._faults.clear()
    assert fetch.archive(url, tmp_path, SHA256).read_bytes() == DATA
    assert "range" in server.requests[-1].headers


def test_a_file_that_changed_meanwhile_is_not_glued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 1)
    url = server.file("/set.zip", DATA, faults=[cut(2_000_000), status(500)])
    with pytest.raises(OSError, match="busy"):
        fetch.archive(url, tmp_path)
    server._faults.clear()
    server.file("/set.zip", DATA[::-1])
    assert fetch.archive(url, tmp_path).read_bytes() == DATA[::-1]
    assert server.requests[-1].headers["if-range"] == f'"{SHA256}"'


def test_a_job_that_was_killed_before_the_last_step(server, tmp_path):
    url = server.file("/set.zip", DATA)
    (tmp_path / "set.zip.partial").write_bytes(DATA)
    (tmp_path / "set.zip.partial.tag").write_text(f'"{SHA256}"')
    assert fetch.archive(url, tmp_path, SHA256).read_bytes() == DATA
    assert len(server.requests) == 1
    (tmp_path / "set.zip").unlink()
    (tmp_path / "set.zip.partial").write_bytes(DATA + b"more")
    (tmp_path / "set.zip.partial.tag").write_text(f'"{SHA256}"')
    assert fetch.archive(url, tmp_path, SHA256).read_bytes() == DATA


def test_a_rest_without_a_tag_is_fetched_anew(server, tmp_path):
    def untagged(request):
        return Reply(200, DATA, {"Content-Type": "application/zip"}, ranged=True)

    url = server.route("/set.zip", untagged, faults=[cut(2_000_000)])
    assert fetch.archive(url, tmp_path).read_bytes() == DATA
    assert [("range" in request.headers) for request in server.requests] == [False, False]


def test_a_wrong_checksum_names_both_and_keeps_nothing(server, tmp_path):
    url = server.file("/set.zip", DATA)
    with pytest.raises(ValueError, match=f"sha256 {SHA256}, {'0' * 64} is expected"):
        fetch.archive(url, tmp_path, "0" * 64)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="3072000 bytes, 5 are expected"):
        fetch.archive(url, tmp_path, size=5)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (status(404), ValueError, r"set\.zip: there is no such file \(404\)"),
        (status(403), ValueError, r"not for everyone \(403\)"),
        (status(410), ValueError, r"answers 410"),
        (status(503), OSError, r"busy \(503\)"),
        (html(), ValueError, "a web page came instead of the file"),
    ],
)
def test_what_no_patience_helps(server, tmp_path, monkeypatch, fault, error, words):
    monkeypatch.setattr(fetch, "RETRIES", 2)
    url = server.file("/set.zip", DATA, faults=[fault])
    with pytest.raises(error, match=words):
        fetch.archive(url, tmp_path)
    assert not (tmp_path / "set.zip").exists()


def test_a_page_that_was_asked_for(server, tmp_path):
    url = server.file("/page.html", b"<html>", kind="text/html")
    assert fetch.archive(url, tmp_path).read_bytes() == b"<html>"


def test_a_connection_that_always_breaks_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 2)
    url = server.file("/set.zip", DATA, faults=[cut(0, times=None)])
    with pytest.raises(OSError, match=r"cannot fetch .*0 bytes are kept in .*, run again"):
        fetch.archive(url, tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(OSError, match="cannot fetch"):
        fetch.archive("http://127.0.0.1:9/set.zip", tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_keeps_what_came(server, tmp_path):
    url = server.file("/set.zip", DATA)
    (tmp_path / "set.zip.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"no room for set\.zip .*make room and run again") as error:
        fetch.archive(url, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "set.zip").exists()


def test_too_little_disk_is_said_before(server, tmp_path, monkeypatch):
    url = server.file("/set.zip", DATA)
    server.hub("owner/set", "main", FILES)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="no room"):
        fetch.archive(url, tmp_path)
    with pytest.raises(OSError, match="no room"):
        fetch.hub("owner/set", "main", ["train/*"], tmp_path)
    assert not any(name.endswith((".tar", ".zip")) for name in names(tmp_path))


# --- archives -----------------------------------------------------------------------------------


def tar_of(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tar.xz", "set.zip"])
def test_an_archive_becomes_a_folder(tmp_path, name):
    members = [("a/one.txt", b"1"), ("two.txt", b"22")]
    mode = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}.get(Path(name).suffix)
    make = tar_of if mode else zip_of
    archive = make(tmp_path / name, members, *([mode] if mode else []))
    folder = fetch.extract(archive, tmp_path / "out")
    assert names(folder) == ["a/one.txt", "two.txt"]
    (folder / "two.txt").write_bytes(b"mine")
    fetch.extract(archive, folder)
    assert (folder / "two.txt").read_bytes() == b"mine"


def test_another_archive_replaces_the_folder(tmp_path):
    fetch.extract(zip_of(tmp_path / "a.zip", [("a", b"a")]), tmp_path / "out")
    fetch.extract(zip_of(tmp_path / "b.zip", [("b", b"b")]), tmp_path / "out")
    assert names(tmp_path / "out") == ["b"]


EVIL = ["../evil", "/flame-evil", "a/../../evil", "a\\..\\..\\evil", "C:/evil"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("make", [tar_of, zip_of], ids=["tar", "zip"])
def test_names_that_lead_out_of_the_folder(tmp_path, make, name):
    archive = make(tmp_path / "in", [("fine", b"1"), (name, b"evil")])
    with pytest.raises(ValueError, match="leads out of its folder"):
        fetch.extract(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path("/flame-evil").exists()
    assert not (tmp_path / "deep/out").exists()


@pytest.mark.parametrize(
    "content",
    [
        (tarfile.SYMTYPE, "/etc"),
        (tarfile.LNKTYPE, "../../etc/passwd"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
    ids=["symlink", "hardlink", "device", "fifo"],
)
def test_links_and_devices(tmp_path, content):
    archive = tar_of(tmp_path / "set.tar", [("a", content), ("a/b", b"evil")])
    with pytest.raises(ValueError, match="'a' is a link or a device"):
        fetch.extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("a")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr(info, "/etc")
    with pytest.raises(ValueError, match="'a' is a link"):
        fetch.extract(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.parametrize("make", [tar_of, zip_of], ids=["tar", "zip"])
def test_a_bomb_is_not_unpacked(tmp_path, make):
    zeros = bytes(5_000_000)
    archive = make(tmp_path / "in", [("a", zeros), ("b", zeros)], *(["w:gz"] * (make is tar_of)))
    assert archive.stat().st_size < 50_000
    with pytest.raises(ValueError, match=r"expands to over 0\.0 GB, 0\.0 are allowed"):
        fetch.extract(archive, tmp_path / "out", max_bytes=9_000_000)
    assert not (tmp_path / "out").exists()
    fetch.extract(archive, tmp_path / "out", max_bytes=10_000_000)
    assert names(tmp_path / "out") == ["a", "b"]


def test_an_archive_that_breaks_off_anywhere(tmp_path):
    members = [("a", b"1" * 1000), ("b", b"2" * 3000)]
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    end = 512 + 1024 + 512 + 3072
    assert not any(whole[end:])
    for length in (1, 300, 511, 512, 600, 1536, 1600, 2048, 4000, end):
        archive = tmp_path / "set.tar"
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"set\.tar is no whole archive"):
            fetch.extract(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tar.xz", "set.zip"])
def test_a_packed_archive_that_breaks_off(tmp_path, name):
    noise = os.urandom(20_000)
    if name.endswith("zip"):
        archive = zip_of(tmp_path / name, [("a", noise), ("b", noise)])
    else:
        archive = tar_of(tmp_path / name, [("a", noise), ("b", noise)], f"w:{name[-2:]}")
    whole = archive.read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 20):
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no whole archive"):
            fetch.extract(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_damaged_zip(tmp_path):
    archive = zip_of(tmp_path / "set.zip", [("a", os.urandom(5000))])
    data = bytearray(archive.read_bytes())
    data[1000] ^= 255
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="is no whole archive"):
        fetch.extract(archive, tmp_path / "out")


# --- files that somebody places -------------------------------------------------------------------


def test_files_to_be_placed(tmp_path):
    folder = tmp_path / "raw"
    with pytest.raises(ValueError, match=r"place .*raw/a\.zip, .*raw/b\.json: fill in the form"):
        fetch.placed(folder, ["a.zip", "b.json"], "fill in the form at example.org")
    (folder / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"place [^,]*raw/b\.json: fill"):
        fetch.placed(folder, ["a.zip", "b.json"], "fill in the form at example.org")
    (folder / "b.json").write_bytes(b"")
    assert fetch.placed(folder, ["a.zip", "b.json"], "") == folder
