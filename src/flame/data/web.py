"""Files of web servers: resumed after interruptions, verified where a checksum is known."""

import logging
import re
import time
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from flame.runtime import progress
from flame.runtime.checksums import sha256 as file_sha256
from flame.runtime.disk import check_room, room
from flame.runtime.errors import root_cause
from flame.runtime.lease import alone
from flame.runtime.resumable import write_atomic

log = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes read at a time
MB = 10**6
RETRIES = 6  # of one request that the server cannot answer now
BACKOFF = 1.0  # seconds before the first retry, doubled before each later one
LONGEST_WAIT = 600  # seconds, whatever the server's Retry-After says
TIMEOUT = 60  # seconds without a byte
BUSY = (429, 500, 502, 503, 504)
INTERRUPTED = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


def download(url: str, folder: Path, sha256: str | None = None, size: int | None = None) -> Path:
    """One file of a web server.

    Args:
        url: its address; the last part of the path becomes its name.
        folder: where it is written.
        sha256: hexadecimal digest that it must have.
        size: bytes that it must have.

    Returns:
        The file.

    Raises:
        ValueError: there is no such file, a web page comes instead, or checksum or size differ.
        OSError: the disk is full, or the server cannot be reached; what came is kept.
    """
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    if not name:
        raise ValueError(f"{url} names no file")
    path = folder / name
    with alone(folder):
        if path.exists():
            _check(path, sha256, size, f"{path} is another file: delete it to fetch it again")
            return path
        aside = path.with_name(f"{name}.partial")
        tag = path.with_name(f"{name}.partial.tag")
        try:
            with room(folder, name):
                _fetch(url, aside, tag, size)
        except requests.RequestException as error:
            kept = f"{_length(aside)} bytes are kept in {aside}, run again"
            raise OSError(f"cannot fetch {url}: {root_cause(error)}; {kept}") from error
        try:
            _check(aside, sha256, size, f"{url} sent another file")
        except ValueError:
            aside.unlink()
            tag.unlink(missing_ok=True)
            raise
        aside.rename(path)
        tag.unlink(missing_ok=True)
    return path


def _fetch(url: str, aside: Path, tag: Path, size: int | None) -> None:
    """Append to a file until it is complete; gives up after `RETRIES` attempts without progress."""
    title = f"fetch {aside.name.removesuffix('.partial')}"
    with requests.Session() as session:
        retry = Retry(
            RETRIES,
            connect=0,
            read=0,
            backoff_factor=BACKOFF,
            status_forcelist=BUSY,
            retry_after_max=LONGEST_WAIT,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        failures = 0
        while True:
            before = _length(aside)
            try:
                return _append(session, url, aside, tag, size, title)
            except INTERRUPTED:
                failures = 0 if _length(aside) > before else failures + 1
                if failures == RETRIES:
                    raise
                log.warning("%s was interrupted at %d bytes: resuming", url, _length(aside))
                time.sleep(BACKOFF * 2**failures)


def _append(
    session: requests.Session, url: str, aside: Path, tag: Path, size: int | None, title: str
) -> None:
    done = _length(aside)
    validator = tag.read_text() if done and tag.exists() else ""
    headers = {"Accept-Encoding": "identity"}  # otherwise the length is that of compressed bytes
    if validator:
        headers |= {"Range": f"bytes={done}-", "If-Range": validator}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and validator:
            # Nothing follows what is there: it is complete, or the file has changed.
            if response.headers.get("Content-Range", "").endswith(f"/{done}"):
                return
            aside.unlink()
            return _append(session, url, aside, tag, size, title)
        _refuse(response, url, aside.name.removesuffix(".partial"))
        start = _start(response, done)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        if size is not None and total != size:
            raise ValueError(f"{url} has {total} bytes, {size} are expected")
        if total:
            check_room(aside.parent, total - start, aside.name)
        write_atomic(tag, _validator(response).encode())
        with aside.open("ab") as file:
            if start < done:
                file.truncate(start)
            _copy(response, file, start, total, title)


def _copy(
    response: requests.Response, file: IO[bytes], start: int, total: int | None, title: str
) -> None:
    done = start
    with progress.bar((total or 0) // MB, "MB", title, done=start // MB) as bar:
        for block in response.iter_content(BLOCK):
            file.write(block)
            done += len(block)
            bar.update(done // MB - bar.n)


def _validator(response: requests.Response) -> str:
    """Strong validator for If-Range; a weak tag allows other bytes, so the date is used instead."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag


def _start(response: requests.Response, done: int) -> int:
    """First byte of the answer: where we are, or 0 if the file has changed."""
    if response.status_code != 206:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != done:
        raise ValueError(f"{response.url}: asked for bytes from {done} on, got another range")
    return done


def _refuse(response: requests.Response, url: str, name: str) -> None:
    if response.status_code == 404:
        raise ValueError(f"{url}: no such file (404)")
    if response.status_code in (401, 403):
        raise ValueError(f"{url}: access is restricted ({response.status_code})")
    if response.status_code in BUSY:
        raise OSError(f"{url}: the server is busy ({response.status_code}), try again later")
    if response.status_code >= 400:
        raise ValueError(f"{url}: the server answers {response.status_code}")
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not re.search(r"\.x?html?$", name):
        raise ValueError(f"{url}: a web page came instead of the file, try it in a browser")


def _check(path: Path, sha256: str | None, size: int | None, trouble: str) -> None:
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{trouble}: {path.stat().st_size} bytes, {size} are expected")
    found = sha256 and file_sha256(path)
    if found != sha256:
        raise ValueError(f"{trouble}: sha256 {found}, {sha256} is expected")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
