"""An output appears whole; what an interrupted job left is kept for the same inputs, by one job."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flame.runtime import resumable as module
from flame.runtime.resumable import BusyError, NoRoomError, resumable, write_atomic


class Killed(BaseException):
    """Stands for whatever ends a job."""


def interrupted(output: Path, fingerprint: dict) -> list[str]:
    """Begin a job that gets killed; names of the files that it found."""
    try:
        with resumable(output, fingerprint) as folder:
            found = [path.name for path in folder.iterdir()]
            (folder / "chunk").write_text("1")
            raise Killed
    except Killed:
        return found


def hold(output: Path, **lease: object) -> Path:
    """Leave the lease of another job."""
    path = output.with_name(output.name + ".partial") / "lease.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"token": "x", "slurm_job": None, "pid": 1, "host": "far"} | lease))
    return path


def dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_output_appears_at_the_end_and_nothing_else_remains(tmp_path):
    output = tmp_path / "out"
    with resumable(output, {"a": 1}) as folder:
        (folder / "chunk").write_text("1")
        assert not output.exists()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/chunk"]


def test_an_older_output_is_replaced_at_the_end(tmp_path):
    output = tmp_path / "out"
    for text in ("old", "new"):
        with resumable(output, {}) as folder:
            assert list(folder.iterdir()) == []
            (folder / text).touch()
    assert [p.name for p in output.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_inputs_go_on_and_others_start_afresh(tmp_path, caplog):
    caplog.set_level("INFO")
    output = tmp_path / "out"
    assert interrupted(output, {"a": 1}) == []
    assert interrupted(output, {"a": 1}) == ["chunk"]
    assert "afresh" not in caplog.text
    assert interrupted(output, {"a": 2}) == []
    assert "starting afresh" in caplog.text


@pytest.mark.parametrize("torn", [None, "", '{"a"'])
def test_a_missing_or_torn_fingerprint_starts_afresh(tmp_path, torn):
    output = tmp_path / "out"
    interrupted(output, {"a": 1})
    record = tmp_path / "out.partial" / "fingerprint.json"
    record.unlink() if torn is None else record.write_text(torn)
    with resumable(output, {"a": 1}) as folder:
        assert list(folder.iterdir()) == []


def test_a_second_job_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    output = tmp_path / "out"
    with resumable(output, {}) as folder:
        (folder / "chunk").touch()
        job = f"process {os.getpid()} on {socket.gethostname()}, SLURM job 4711"
        with pytest.raises(BusyError, match=job), resumable(output, {}):
            pass
    assert (output / "chunk").exists()


def test_a_job_on_another_host_is_refused_while_its_heart_beats(tmp_path):
    lease = hold(tmp_path / "out")
    with pytest.raises(BusyError, match="process 1 on far"), resumable(tmp_path / "out", {}):
        pass
    old = time.time() - module.STALE - 1
    os.utime(lease, (old, old))
    with resumable(tmp_path / "out", {}):
        pass


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path):
    hold(tmp_path / "out", host=socket.gethostname(), pid=dead_pid())
    with resumable(tmp_path / "out", {}):
        pass


def test_the_lease_of_a_process_whose_number_is_anothers_is_taken_over(tmp_path):
    """As in a container that was started anew: this process itself may have the number."""
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    hold(tmp_path / "out", **mine, began=module._began(os.getpid()))
    with pytest.raises(BusyError), resumable(tmp_path / "out", {}):
        pass
    hold(tmp_path / "out", **mine, began="1")
    with resumable(tmp_path / "out", {}):
        pass


def test_the_lease_of_a_zombie_is_taken_over(tmp_path):
    """A killed job whose parent does not ask after it, as where PID 1 is no init."""
    zombie = subprocess.Popen(["sleep", "100"])
    began = module._began(zombie.pid)
    hold(tmp_path / "out", host=socket.gethostname(), pid=zombie.pid, began=began)
    with pytest.raises(BusyError), resumable(tmp_path / "out", {}):
        pass
    zombie.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with resumable(tmp_path / "out", {}):
        pass
    zombie.wait()


def test_a_torn_lease_is_taken_over(tmp_path):
    hold(tmp_path / "out").write_text('{"token"')
    with resumable(tmp_path / "out", {}):
        pass


def test_a_job_that_lost_its_lease_does_not_publish(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(BusyError, match="taken over"), resumable(output, {}):
        hold(output)
    assert not output.exists()


def test_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    with resumable(tmp_path / "out", {}):
        lease = tmp_path / "out.partial" / "lease.json"
        os.utime(lease, (0, 0))
        deadline = time.monotonic() + 5
        while lease.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("name", [".tmp-checkpoint.safetensors", "deeper/.tmpOGcJXe"])
def test_what_a_killed_writer_left_aside_is_not_published(tmp_path, name):
    """The second name is one of those that safetensors gives to what it has not written yet."""
    output = tmp_path / "out"
    interrupted(output, {"a": 1})
    torn = tmp_path / "out.partial/content" / name
    torn.parent.mkdir(exist_ok=True)
    torn.write_text("half")
    with resumable(output, {"a": 1}):
        pass
    assert [p.name for p in output.rglob("*") if p.is_file()] == ["chunk"]


def test_write_atomic_leaves_the_old_file_when_the_writer_fails(tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ZeroDivisionError

    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ],
)
def test_a_full_disk_names_the_file(tmp_path, error):
    """Python's own error does not, where a file is open already."""

    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(NoRoomError, match=r"make room and run again: .*/table.csv'$"):
        write_atomic(tmp_path / "table.csv", write)
    with pytest.raises(NoRoomError, match=r"/out\.partial'$"), resumable(tmp_path / "out", {}):
        raise error


def test_another_error_stays_what_it_is(tmp_path):
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output") as told, resumable(tmp_path / "out", {}):
        raise error
    assert told.value is error
