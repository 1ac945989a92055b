"""Output that is written aside, goes on after an interruption, and appears when it is complete."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)

HEARTBEAT = 10.0  # seconds between two signs of life of a lease
STALE = 120.0  # seconds without a sign of life after which a lease counts for nothing
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BusyError(OSError):
    """Another job holds the output."""


class NoRoomError(OSError):
    """A disk is full, or what may be written on it is used up."""


@contextmanager
def resumable(
    output: Path, fingerprint: Mapping[str, Any], *, file: str | None = None
) -> Iterator[Path]:
    """Folder to write in, which becomes `output` on a clean exit and is kept on any other.

    Everything happens in `<output>.partial`, which Snakemake knows nothing of and so never
    deletes. What an interrupted job left there is kept if it was made under the same fingerprint.

    Args:
        output: folder or file to make; an older one is replaced, at the end.
        fingerprint: all that decides the content, as JSON.
        file: name of a file in the folder, which alone becomes `output`.

    Yields:
        The folder to write in, empty or as an interrupted job left it.

    Raises:
        BusyError: a job that lives, on this or another host, writes the same output.
        NoRoomError: the disk is full.
    """
    aside = output.with_name(output.name + ".partial")
    with _room(aside), _lease(aside / "lease.json") as check:
        content = _content(aside, fingerprint)
        yield content
        check()
        if output.exists():
            output.rename(aside / f"replaced-{uuid.uuid4().hex}")
        (content / file if file else content).rename(output)
        shutil.rmtree(aside)


def write_atomic(path: Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write a file that is whole or not there, whatever interrupts.

    Args:
        path: file to write or replace.
        content: its bytes, or a function that writes them to the path that it is given.

    Raises:
        NoRoomError: the disk is full.
    """
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the suffix: some writers go by it
    try:
        with _room(path):
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _content(aside: Path, fingerprint: Mapping[str, Any]) -> Path:
    content, record = aside / "content", aside / "fingerprint.json"
    wanted = json.dumps(fingerprint, indent=1, sort_keys=True).encode()
    if content.exists() and not (record.exists() and record.read_bytes() == wanted):
        log.info("%s was made from other inputs: starting afresh", aside)
        shutil.rmtree(content)
    write_atomic(record, wanted)
    content.mkdir(exist_ok=True)
    for torn in content.rglob(".tmp*"):  # of `write_atomic` or of safetensors, if it was killed
        torn.unlink()
    return content


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """A full disk, in whatever words a library has for it, as an error that names the file."""
    try:
        yield
    except NoRoomError:
        raise
    except Exception as error:
        # Neither libraries in Rust nor shutil.copytree have an errno, but all name it.
        told = re.search(r"\b(?:Errno|os error) (\d+)\b", str(error))
        number = int(told[1]) if told else 0
        if number not in FULL:
            raise
        words = f"{os.strerror(number)}: make room and run again"
        raise NoRoomError(number, words, str(path)) from error


@contextmanager
def _lease(path: Path) -> Iterator[Callable[[], None]]:
    token = uuid.uuid4().hex
    with _locked(path) as file:
        holder = _read(file)
        if holder and _alive(holder, path):
            raise BusyError(f"{path.parent} is being written by {_job(holder)}")
        if holder:
            log.info("%s was left by %s", path.parent, _job(holder))
        job_id = os.environ.get("SLURM_JOB_ID")
        here = {"host": _host(), "pid": os.getpid(), "began": _began(os.getpid())}
        lease = {"token": token, **here, "slurm_job": job_id}
        file.truncate(0)
        json.dump(lease, file)

    def check() -> None:
        with path.open() as file:
            holder = _read(file)
        if holder.get("token") != token:
            raise BusyError(
                f"{path.parent} was taken over by another job while this one stood still"
            )

    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    try:
        yield check
    finally:
        ended.set()
        if path.exists():  # not after success: it went with its folder
            with _locked(path) as file:
                if _read(file).get("token") == token:
                    path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """The lease file, open for reading and rewriting by one process at a time."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Between open and lock its holder may have removed it: then this is nobody's file.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.load(file)
    except json.JSONDecodeError:  # new, or its writer was killed
        return {}


def _job(holder: Mapping[str, Any]) -> str:
    slurm = f", SLURM job {holder['slurm_job']}" if holder["slurm_job"] else ""
    return f"process {holder['pid']} on {holder['host']}{slurm}"


def _alive(holder: Mapping[str, Any], path: Path) -> bool:
    if holder["host"] == _host() and not _runs(holder["pid"], holder.get("began")):
        return False
    return time.time() - path.stat().st_mtime < STALE


def _runs(pid: int, began: str | None) -> bool:
    """Whether the process still runs: its number may be another's by now, as in a new container."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return began is None or began == _began(pid)


def _began(pid: int) -> str | None:
    """When a process began, as Linux counts; None of one that ended, and where that is not told."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else fields[18]  # a zombie waits for its parent, but has ended


def _host() -> str:
    return socket.gethostname()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        try:
            os.utime(path)
        except FileNotFoundError:
            return
