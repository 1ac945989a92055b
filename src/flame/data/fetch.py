"""Bytes from elsewhere: files of a hub, archives of the web, files that somebody has to place.

Each of them lies in its folder only when it is whole and is what was asked for; what is there
already is not fetched again, and a job that was killed goes on where it was.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import requests
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_token
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from flame.runtime import progress
from flame.runtime.checksums import sha256 as file_sha256
from flame.runtime.errors import known
from flame.runtime.resumable import FULL, NoRoomError, write_atomic

log = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for every request

T = TypeVar("T")
Kind = Literal["dataset", "model"]

SOURCE = ".flame-source.json"  # in a folder: where its files come from
BLOCK = 1 << 20  # bytes read at a time
MB = 10**6
RETRIES = 6  # of one request that a server cannot answer now
BACKOFF = 1.0  # seconds before the second of them, doubled before each one after it
LONGEST_WAIT = 600  # seconds, whatever a server's Retry-After says
WORKERS = 8  # files fetched from a hub at a time
TIMEOUT = 60  # seconds without a byte
BUSY = (429, 500, 502, 503, 504)
BROKEN_OFF = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)
EXPANSION = 20  # an archive of more than so many times its size, and a GB, is taken for a bomb


# --- a hub ------------------------------------------------------------------------------------


@dataclass
class _Snapshot:
    """What is known of a repository at one commit, kept beside its files."""

    repo: str
    kind: str
    revision: str
    commit: str
    tree: dict[str, dict[str, Any]]
    verified: list[str]

    def save(self, folder: Path) -> None:
        write_atomic(folder / SOURCE, json.dumps(vars(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> "_Snapshot | None":
        path = folder / SOURCE
        return cls(**json.loads(path.read_text())) if path.exists() else None


def hub(
    repo: str, revision: str, files: Sequence[str], folder: Path, *, kind: Kind = "dataset"
) -> Path:
    """Files of a repository at a revision; `HF_ENDPOINT` and `HF_TOKEN` are honoured.

    Each file is compared with the checksum that the hub lists for it. The commit that a branch
    was is written into `.flame-source.json`, and a later call goes on with that commit.

    Args:
        repo: `owner/name`.
        revision: hash of a commit, or name of a branch or tag.
        files: glob patterns, each of which has to match something.
        folder: to write them in, under their names in the repository.
        kind: what it is a repository of.

    Returns:
        The folder.

    Raises:
        ValueError: the repository is gated or unknown, a pattern matches nothing, a file is not
            what the hub lists, or the hub cannot be reached.
    """
    with _alone(folder), _explained(repo, revision, kind, folder):
        snapshot = _snapshot(repo, revision, folder, kind)
        names = _matching(files, snapshot)
        unsure = [name for name in names if not _is_there(folder, name, snapshot)]
        if unsure:
            for name in unsure:
                _remove_broken(folder / name, snapshot.tree[name])
            missing = [name for name in unsure if not (folder / name).is_file()]
            snapshot.verified = sorted({*snapshot.verified, *names}.difference(missing))
            snapshot.save(folder)
            _download(missing, snapshot, folder)
    return folder


def hub_files(repo: str, revision: str, folder: Path, *, kind: Kind = "dataset") -> list[str]:
    """Names of all files of a repository at a revision, in order, without fetching them."""
    with _alone(folder), _explained(repo, revision, kind, folder):
        return sorted(_snapshot(repo, revision, folder, kind).tree)


def commit(folder: Path) -> str:
    """The commit that the files of a folder are of, once `hub` or `hub_files` wrote there."""
    snapshot = _Snapshot.load(folder)
    if snapshot is None:
        raise ValueError(f"{folder} was not fetched from a hub")
    return snapshot.commit


def _snapshot(repo: str, revision: str, folder: Path, kind: Kind) -> _Snapshot:
    """What is known already, or is to be asked of the hub now."""
    old = _Snapshot.load(folder)
    if old and (old.repo, old.kind, old.revision) == (repo, kind, revision):
        return old
    if old:
        raise ValueError(
            f"{folder} holds {old.kind} {old.repo!r} at {old.revision!r}, not {repo!r} at "
            f"{revision!r}: delete it first"
        )
    api = HfApi(endpoint=_endpoint())
    sha = _patiently(lambda: api.repo_info(repo, repo_type=kind, revision=revision).sha)
    assert sha is not None
    entries = _patiently(
        lambda: list(api.list_repo_tree(repo, recursive=True, revision=sha, repo_type=kind))
    )
    tree = {entry.path: _entry(entry) for entry in entries if isinstance(entry, RepoFile)}
    for name in tree:
        _refuse_outside(name, repo)
    snapshot = _Snapshot(repo, kind, revision, sha, tree, [])
    snapshot.save(folder)
    return snapshot


def _entry(file: RepoFile) -> dict[str, Any]:
    digest = {"sha256": file.lfs.sha256} if file.lfs else {"blob": file.blob_id}
    return {"size": file.lfs.size if file.lfs else file.size} | digest


def _matching(patterns: Sequence[str], snapshot: _Snapshot) -> list[str]:
    names: set[str] = set()
    for pattern in patterns:
        found = [name for name in snapshot.tree if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"{snapshot.repo!r} at {snapshot.revision!r} has no file "
                + known(pattern, sorted(snapshot.tree)[:20])
            )
        names.update(found)
    return sorted(names)


def _is_there(folder: Path, name: str, snapshot: _Snapshot) -> bool:
    path = folder / name
    size = snapshot.tree[name]["size"]
    return name in snapshot.verified and path.is_file() and path.stat().st_size == size


def _download(names: Sequence[str], snapshot: _Snapshot, folder: Path) -> None:
    """Several files at a time, each of them checked as soon as it is there."""
    total = sum(snapshot.tree[name]["size"] for name in names)
    _check_room(folder, total, snapshot.repo)
    for leftover in (folder / ".cache/huggingface/download").rglob("*.incomplete"):
        leftover.unlink()
    title = f"fetch {snapshot.repo}"
    with (
        progress.bar(total // MB, "MB", title) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        counter = _counter(bar)

        def one(name: str) -> str:
            _patiently(
                lambda: hf_hub_download(
                    snapshot.repo,
                    name,
                    repo_type=snapshot.kind,
                    revision=snapshot.commit,
                    local_dir=folder,
                    endpoint=_endpoint(),
                    tqdm_class=counter,
                )
            )
            _verify(folder, name, snapshot)
            return name

        jobs = [pool.submit(one, name) for name in names]
        try:
            for job in as_completed(jobs):
                snapshot.verified.append(job.result())
                snapshot.save(folder)
        finally:
            for job in jobs:
                job.cancel()


def _counter(bar: tqdm) -> Any:
    """A class that huggingface_hub takes for that of its bars; all of them move one of ours."""
    lock = threading.Lock()
    done = 0

    class Counter:
        def __init__(self, **options: Any) -> None:
            pass

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            nonlocal done
            with lock:
                done += int(count or 0)
                bar.update(done // MB - bar.n)

        def close(self, *words: object, **options: object) -> None:
            pass

        # Bytes of the network, which Xet tells of beside those of the file, are not counted again.
        refresh = set_postfix_str = update_transfer = set_transfer_postfix_str = close

    return Counter


def _remove_broken(path: Path, listed: dict[str, Any]) -> None:
    """Else huggingface_hub would take it for the file where it cannot fetch another."""
    if path.is_file():
        found, wanted = _checksums(path, listed)
        if found != wanted:
            path.unlink()


def _verify(folder: Path, name: str, snapshot: _Snapshot) -> None:
    found, wanted = _checksums(folder / name, snapshot.tree[name])
    if found != wanted:
        (folder / name).unlink()
        raise ValueError(
            f"{name} of {snapshot.repo!r} has checksum {found}, the hub lists {wanted}:"
            " it was deleted, run again"
        )


def _checksums(path: Path, listed: dict[str, Any]) -> tuple[str, str]:
    if "sha256" in listed:
        return file_sha256(path), listed["sha256"]
    return _git_blob(path), listed["blob"]


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _patiently(call: Callable[[], T]) -> T:
    """The answer of a hub that may be busy at first."""
    for attempt in range(RETRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            asked = error.response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else BACKOFF * 2**attempt
            log.warning("the hub answers %s: waiting", error.response.status_code)
            time.sleep(min(wait, LONGEST_WAIT))
    return call()


@contextmanager
def _explained(repo: str, revision: str, kind: str, folder: Path) -> Iterator[None]:
    """Errors of huggingface_hub as one line that says what to do, and holds no token."""
    token = "HF_TOKEN is set, but may not see it" if get_token() else "HF_TOKEN is not set"
    where = _endpoint() or "the Hugging Face hub"
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo!r} is gated: ask for access on its hub page,"
            " then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{where} has no {kind} {repo!r}, or it is private ({token})") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo!r} has no revision {revision!r}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(
            f"cannot fetch {repo!r} from {where}: {_cause(error)}; what came is kept in {folder}, "
            "run again"
        ) from error
    except NoRoomError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _no_room(folder, repo, error) from error
        raise ValueError(
            f"cannot fetch {repo!r} from {where}: {_cause(error)}; what came is kept in {folder}, "
            "run again"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} does not answer as a hub does: see HF_ENDPOINT") from error
    except ValueError:
        raise
    except Exception as error:
        # The hub's client has errors of its own for a network that is down, not all of one family.
        if type(error).__module__.split(".")[0] not in ("httpx2", "httpcore2", "huggingface_hub"):
            raise
        raise ValueError(
            f"cannot reach {where} for {repo!r}: {_cause(error)}; what came is kept in {folder}, "
            "run again"
        ) from error


def _cause(error: BaseException) -> str:
    """First line of what is behind an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- the web ------------------------------------------------------------------------------------


def archive(url: str, folder: Path, sha256: str | None = None, size: int | None = None) -> Path:
    """One file of a web server.

    Args:
        url: its address; the last part of the path becomes its name.
        folder: to write it in.
        sha256: hexadecimal digest it must have.
        size: bytes it must have.

    Returns:
        The file.

    Raises:
        ValueError: there is no such file, a web page comes instead of it, or it has another
            checksum or length.
        OSError: the disk is full, or the server cannot be reached; what came is kept.
    """
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    if not name:
        raise ValueError(f"{url} names no file")
    path = folder / name
    with _alone(folder):
        if path.exists():
            _check(path, sha256, size, f"{path} is another file: delete it to fetch it again")
            return path
        aside = path.with_name(f"{name}.partial")
        tag = path.with_name(f"{name}.partial.tag")
        try:
            _fetch(url, aside, tag, size)
            try:
                _check(aside, sha256, size, f"{url} sent another file")
            except ValueError:
                aside.unlink()
                tag.unlink(missing_ok=True)
                raise
            aside.rename(path)
        except requests.RequestException as error:
            raise OSError(f"cannot fetch {url}: {_cause(error)}; {_kept(aside)}") from error
        except NoRoomError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise _no_room(folder, name, error) from error
            raise
        tag.unlink(missing_ok=True)
    return path


def _fetch(url: str, aside: Path, tag: Path, size: int | None) -> None:
    """Append to a file until it is whole; gives up where a whole round brings nothing."""
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
            except BROKEN_OFF:
                failures = 0 if _length(aside) > before else failures + 1
                if failures == RETRIES:
                    raise
                log.warning("%s broke off at %d bytes: going on", url, _length(aside))
                time.sleep(BACKOFF * 2**failures)


def _append(
    session: requests.Session, url: str, aside: Path, tag: Path, size: int | None, title: str
) -> None:
    done = _length(aside)
    validator = tag.read_text() if done and tag.exists() else ""
    headers = {"Accept-Encoding": "identity"}  # else the length would be that of packed bytes
    if validator:
        headers |= {"Range": f"bytes={done}-", "If-Range": validator}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and validator:
            # Nothing after what is there: it is whole, or it is another file's.
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
            _check_room(aside.parent, total - start, aside.name)
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
    """What tells whether a file has changed: a weak tag does not, as it allows other bytes."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag


def _start(response: requests.Response, done: int) -> int:
    """Byte at which the answer begins: where we are, or the first if the file has changed."""
    if response.status_code != 206:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != done:
        raise ValueError(f"{response.url}: asked for bytes from {done} on, got others")
    return done


def _refuse(response: requests.Response, url: str, name: str) -> None:
    if response.status_code == 404:
        raise ValueError(f"{url}: there is no such file (404)")
    if response.status_code in (401, 403):
        raise ValueError(f"{url}: not for everyone ({response.status_code})")
    if response.status_code in BUSY:
        raise OSError(f"{url}: the server is busy ({response.status_code}), try again later")
    if response.status_code >= 400:
        raise ValueError(f"{url}: the server answers {response.status_code}")
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not re.search(r"\.x?html?$", name):
        raise ValueError(f"{url}: a web page came instead of the file, open it in a browser")


def _check(path: Path, sha256: str | None, size: int | None, trouble: str) -> None:
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{trouble}: {path.stat().st_size} bytes, {size} are expected")
    found = sha256 and file_sha256(path)
    if found != sha256:
        raise ValueError(f"{trouble}: sha256 {found}, {sha256} is expected")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _kept(aside: Path) -> str:
    return f"{_length(aside)} bytes are kept in {aside}, run again"


# --- archives -----------------------------------------------------------------------------------


def extract(archive: Path, folder: Path, *, max_bytes: int | None = None) -> Path:
    """The files of a tar, however compressed, or of a zip.

    Links are refused altogether: the sets have none, and they are the usual way out of a folder.

    Args:
        archive: the file.
        folder: to make; left alone if it was made from this archive before.
        max_bytes: most that it may expand to; by default 20 times its size, and a GB.

    Returns:
        The folder.

    Raises:
        ValueError: the archive is broken off, has names that lead elsewhere, links or devices,
            or expands to more than it should.
    """
    size = archive.stat().st_size
    origin = {"archive": archive.name, "size": size}
    limit = max_bytes or EXPANSION * size + 1000 * MB
    record = folder / SOURCE
    with _alone(folder.parent):
        if record.exists() and json.loads(record.read_text()) == origin:
            return folder
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            if zipfile.is_zipfile(archive):
                _unzip(archive, aside, limit)
            else:
                _untar(archive, aside, limit)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, LZMAError) as error:
            raise ValueError(
                f"{archive} is no whole archive ({error}): delete it and run again"
            ) from error
        except OSError as error:
            if error.errno in FULL:
                raise _no_room(folder, archive.name, error) from error
            raise
        (aside / SOURCE).write_text(json.dumps(origin))
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    return folder


def _unzip(archive: Path, folder: Path, limit: int) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        _refuse_bomb(archive, sum(member.file_size for member in members), limit)
        for member in members:
            _refuse_outside(member.filename, archive)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{archive}: {member.filename!r} is a link")
            if member.flag_bits & 1:
                raise ValueError(f"{archive}: {member.filename!r} is encrypted")
            file.extract(member, folder)


def _untar(archive: Path, folder: Path, limit: int) -> None:
    total = 0
    with tarfile.open(archive) as file:
        for member in whole_members(file, archive):
            _refuse_outside(member.name, archive)
            if not (member.isreg() or member.isdir()):
                raise ValueError(f"{archive}: {member.name!r} is a link or a device")
            total += member.size
            _refuse_bomb(archive, total, limit)
            file.extract(member, folder, filter="data")


def whole_members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Members of a tar, in order; `tarfile` alone takes one that breaks off between two for whole.

    Raises:
        tarfile.ReadError: it has no end.
    """
    yield from tar
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"{path} ends without the mark of an end")
    while tar.fileobj.read(BLOCK):  # to the checksum of a packed one
        pass


def _refuse_bomb(archive: Path, total: int, limit: int) -> None:
    if total > limit:
        raise ValueError(
            f"{archive} expands to over {total / 1e9:.1f} GB, {limit / 1e9:.1f} are allowed"
        )


def _refuse_outside(name: str, place: object) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"{place}: the name {name!r} leads out of its folder")


# --- files that somebody places -------------------------------------------------------------------


def placed(folder: Path, files: Sequence[str], how: str) -> Path:
    """A folder with files that cannot be fetched without a person, such as behind a form.

    Args:
        folder: where they have to lie; made if missing.
        files: their names in it.
        how: what one has to do to get them.

    Raises:
        ValueError: one is not there; says where to put each that is missing, and how to get it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [str(folder / name) for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(f"please place {', '.join(missing)}: {how}")
    return folder


# --- shared ---------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other job fetches into the folder: several sets may come from one source."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".flame-lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another job that fetches into %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_room(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        lack = f"it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        words = f"no room for {what}: {lack}; make room and run again"
        raise NoRoomError(errno.ENOSPC, words, str(folder))


def _no_room(folder: Path, what: str, error: OSError) -> OSError:
    return NoRoomError(
        error.errno,
        f"no room for {what} ({error.strerror}): what came is kept, make room and run again",
        str(folder),
    )
