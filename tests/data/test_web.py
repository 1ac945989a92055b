"""Files of web servers: whatever goes wrong on the way, a file is complete, or not there."""

import errno
import hashlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flame.data import web
from flame.runtime import disk
from tests.data.test_hub import names
from tests.loopback import Loopback, Reply, cut, html, status, without_range

DATA = bytes(range(256)) * 12_000  # 3 MB: three blocks
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    with Loopback() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(web, "BACKOFF", 0.01)


def test_a_file_of_the_web(server, tmp_path):
    url = server.file("/some/a%20set.zip", DATA)
    server._routes["/some/a set.zip"] = server._routes.pop("/some/a%20set.zip")
    path = web.download(url + "?download=1", tmp_path, SHA256, len(DATA))
    assert path == tmp_path / "a set.zip"
    assert path.read_bytes() == DATA
    assert names(tmp_path) == ["a set.zip"]


def test_a_file_that_is_there_is_checked_and_not_fetched(server, tmp_path):
    (tmp_path / "set.zip").write_bytes(DATA)
    web.download(f"{server.url}/set.zip", tmp_path, SHA256)
    with pytest.raises(ValueError, match=f"is another file: delete it.*{SHA256}, {'0' * 64} is"):
        web.download(f"{server.url}/set.zip", tmp_path, "0" * 64)
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
    assert web.download(url, tmp_path, SHA256).read_bytes() == DATA
    assert names(tmp_path) == ["set.zip"]


def test_it_waits_as_long_as_the_server_asks(server, tmp_path):
    url = server.file("/set.zip", DATA, faults=[status(429, times=1, retry_after=1)])
    start = time.monotonic()
    web.download(url, tmp_path)
    assert 1 <= time.monotonic() - start < 5


def test_only_the_rest_is_fetched(server, tmp_path):
    url = server.file("/set.zip", DATA, faults=[cut(2_000_000)])
    web.download(url, tmp_path, SHA256)
    first, second = server.asked("/set.zip")
    assert "range" not in first.headers
    assert int(second.headers["range"][6:-1]) > 1_000_000


def test_a_job_that_was_killed_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "RETRIES", 1)
    url = server.file("/set.zip", DATA, faults=[cut(2_000_000), *[status(500)]])
    with pytest.raises(OSError, match=r"busy \(500\)"):
        web.download(url, tmp_path)
    assert names(tmp_path) == ["set.zip.partial", "set.zip.partial.tag"]
    server._faults.clear()
    assert web.download(url, tmp_path, SHA256).read_bytes() == DATA
    assert "range" in server.requests[-1].headers


def test_a_file_that_changed_meanwhile_is_not_glued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "RETRIES", 1)
    url = server.file("/set.zip", DATA, faults=[cut(2_000_000), status(500)])
    with pytest.raises(OSError, match="busy"):
        web.download(url, tmp_path)
    server._faults.clear()
    server.file("/set.zip", DATA[::-1])
    assert web.download(url, tmp_path).read_bytes() == DATA[::-1]
    assert server.requests[-1].headers["if-range"] == f'"{SHA256}"'


def test_a_job_that_was_killed_before_the_last_step(server, tmp_path):
    url = server.file("/set.zip", DATA)
    (tmp_path / "set.zip.partial").write_bytes(DATA)
    (tmp_path / "set.zip.partial.tag").write_text(f'"{SHA256}"')
    assert web.download(url, tmp_path, SHA256).read_bytes() == DATA
    assert len(server.requests) == 1
    (tmp_path / "set.zip").unlink()
    (tmp_path / "set.zip.partial").write_bytes(DATA + b"more")
    (tmp_path / "set.zip.partial.tag").write_text(f'"{SHA256}"')
    assert web.download(url, tmp_path, SHA256).read_bytes() == DATA


def test_a_rest_without_a_tag_is_fetched_again(server, tmp_path):
    def untagged(request):
        return Reply(200, DATA, {"Content-Type": "application/zip"}, ranged=True)

    url = server.route("/set.zip", untagged, faults=[cut(2_000_000)])
    assert web.download(url, tmp_path).read_bytes() == DATA
    assert [("range" in request.headers) for request in server.requests] == [False, False]


def test_a_wrong_checksum_names_both_and_keeps_nothing(server, tmp_path):
    url = server.file("/set.zip", DATA)
    with pytest.raises(ValueError, match=f"sha256 {SHA256}, {'0' * 64} is expected"):
        web.download(url, tmp_path, "0" * 64)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="3072000 bytes, 5 are expected"):
        web.download(url, tmp_path, size=5)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (status(404), ValueError, r"set\.zip: no such file \(404\)"),
        (status(403), ValueError, r"access is restricted \(403\)"),
        (status(410), ValueError, r"answers 410"),
        (status(503), OSError, r"busy \(503\)"),
        (html(), ValueError, "a web page came instead of the file"),
    ],
)
def test_what_no_patience_helps(server, tmp_path, monkeypatch, fault, error, words):
    monkeypatch.setattr(web, "RETRIES", 2)
    url = server.file("/set.zip", DATA, faults=[fault])
    with pytest.raises(error, match=words):
        web.download(url, tmp_path)
    assert not (tmp_path / "set.zip").exists()


def test_a_page_that_was_asked_for(server, tmp_path):
    url = server.file("/page.html", b"<html>", kind="text/html")
    assert web.download(url, tmp_path).read_bytes() == b"<html>"


def test_a_connection_that_always_breaks_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "RETRIES", 2)
    url = server.file("/set.zip", DATA, faults=[cut(0, times=None)])
    with pytest.raises(OSError, match=r"cannot fetch .*0 bytes are kept in .*, run again"):
        web.download(url, tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(OSError, match="cannot fetch"):
        web.download("http://127.0.0.1:9/set.zip", tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_keeps_what_came(server, tmp_path):
    url = server.file("/set.zip", DATA)
    (tmp_path / "set.zip.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"no room for set\.zip .*free some space") as error:
        web.download(url, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "set.zip").exists()


def test_too_little_disk_is_refused_before_anything_is_fetched(server, tmp_path, monkeypatch):
    url = server.file("/set.zip", DATA)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="no room"):
        web.download(url, tmp_path)
    assert names(tmp_path) == []
