"""One writer per output, also across hosts that share a file system.

Built on `filelock.SoftFileLease`: a marker file that its holder refreshes. Three small additions:
a refusal that names the holder and its SLURM job, and the two kinds of dead holder that filelock
does not recognise (see `_discard_dead`).
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

log = logging.getLogger(__name__)

HEARTBEAT = 10.0  # seconds between two refreshes
EXPIRES = 60.0  # seconds without a refresh after which a lease from another host may be taken over
POLL = 0.2  # seconds between two attempts
GRACE = 1.0  # seconds that a marker may stay empty: a live holder fills it at once


class BusyError(OSError):
    """Another job holds the lease."""


@contextmanager
def lease(path: Path, what: str, *, wait: bool = False) -> Iterator[Callable[[], None]]:
    """Hold a lease; released on any exit, SIGTERM included.

    The lease of a process that was killed is void: at once on the same host, on another host after
    `EXPIRES` seconds without a refresh.

    Args:
        path: marker file; its folder is made if missing.
        what: what is protected, for messages.
        wait: wait for a live holder instead of refusing.

    Yields:
        A function that raises BusyError if the lease was lost in the meantime.

    Raises:
        BusyError: a live job on this or another host holds the lease.
    """
    marker = SoftFileLease(path, lease_duration=EXPIRES, heartbeat_interval=HEARTBEAT)
    job_record = path.with_suffix(".json")

    def is_held() -> bool:
        owner = marker.owner
        return owner is not None and owner.token == marker.token

    def check() -> None:
        if not is_held():
            raise BusyError(f"{what} was taken over by another job while this one was stalled")

    try:
        _acquire(marker, job_record, what, wait=wait)
        _record_job(marker, job_record)
        yield check
    finally:
        if is_held():
            job_record.unlink(missing_ok=True)
        marker.release()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for other jobs that fetch into the same folder: several data sets may share a source."""
    with lease(folder / ".flame-lock", str(folder), wait=True):
        yield


def _acquire(marker: SoftFileLease, job_record: Path, what: str, *, wait: bool) -> None:
    path = Path(marker.lock_file)
    previous = holder(marker, job_record)
    deadline = time.monotonic() + 2 * EXPIRES
    waiting = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            marker.acquire(timeout=0)
        except FileNotFoundError:  # the previous holder finished and removed the folder
            continue
        except Timeout:
            if _discard_dead(marker):
                continue
        else:
            if previous and not waiting:
                log.info("%s was left by %s", what, previous)
            return
        if not wait and (not _may_be_expired(path) or time.monotonic() > deadline):
            raise BusyError(f"{what} is being written by {holder(marker, job_record)}")
        if not waiting:
            log.info("%s: waiting for %s", what, holder(marker, job_record))
            waiting = True
        time.sleep(POLL)


def _may_be_expired(path: Path) -> bool:
    """Whether the marker looks unrefreshed.

    A hint only, as clocks of two hosts differ: filelock then watches the marker for `EXPIRES`
    seconds on its own clock before it takes over. Without the hint every refusal would take that
    long.
    """
    try:
        return time.time() - path.stat().st_mtime > EXPIRES
    except FileNotFoundError:
        return True


def _discard_dead(marker: SoftFileLease) -> bool:
    """Remove a marker whose holder is certainly dead though filelock takes it for alive.

    - An empty or torn marker: its holder was killed between creating and writing it. filelock
      never breaks an empty one, as its releases before 3.22 wrote nothing else.
    - The marker of a zombie on this host: killed, but not reaped by its parent, which in a
      container without an init may never happen. filelock only asks whether the PID exists.

    Returns:
        Whether the marker is gone.
    """
    path = Path(marker.lock_file)
    try:
        seen = path.stat()
        if marker.owner is None:
            time.sleep(max(0.0, GRACE - (time.time() - seen.st_mtime)))
        if marker.owner is not None and not _is_zombie(marker):
            return False
        if os.path.samestat(seen, path.stat()):
            path.unlink()
    except FileNotFoundError:
        pass
    return True


def _is_zombie(marker: SoftFileLease) -> bool:
    owner = marker.owner
    if owner is None or owner.hostname.partition("?")[0] != socket.gethostname():
        return False
    try:
        state, *fields = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    # The low 64 bits of the token are the start time, so that a reused PID is not mistaken.
    return state == "Z" and (owner.start is None or owner.start % 2**64 == int(fields[18]))


def holder(marker: SoftFileLease, job_record: Path) -> str:
    """Process, host and SLURM job that hold a lease; empty if nobody does."""
    owner = marker.owner
    if owner is None:
        return ""
    # filelock appends the PID namespace to the host, after a "?".
    place = f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
    try:
        record = json.loads(job_record.read_text())
    except (OSError, ValueError):  # not in SLURM, or its writer was killed
        return place
    return f"{place}, SLURM job {record['job']}" if record["token"] == owner.token else place


def _record_job(marker: SoftFileLease, job_record: Path) -> None:
    """Write the SLURM job beside the marker, whose format has no field for it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        job_record.write_text(json.dumps({"token": marker.token, "job": job}))
