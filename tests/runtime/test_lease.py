"""One writer per output: a live holder is refused by name, a dead one counts for nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease

from flame.runtime import lease as module
from flame.runtime.lease import BusyError, lease
from flame.runtime.resumable import resumable

HOLDER = """
import sys, time
from pathlib import Path
from flame.runtime import command, resumable
def hold(out: Path) -> None:
    with resumable.resumable(out, {}):
        print("held", flush=True)
        time.sleep(100)
command.main(hold)
"""


def holding(out: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that holds the lease of an output."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
        | {"PYTHONUNBUFFERED": "1"}
        | environment,
    )
    assert process.stdout.readline() == "held\n"
    return process


def marker(out: Path) -> Path:
    return out.with_name(out.name + ".partial") / "lease.lock"


def far(out: Path, **changes: object) -> Path:
    """The lease of a process on another host."""
    lines = {"pid": 1, "host": "far", "mode": "lease", "token": "x", "duration": module.EXPIRES}
    path = marker(out)
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{key}={value}\n" for key, value in (lines | changes).items())
    path.write_text(f"filelock/2\n{text}")
    return path


def free(out: Path) -> None:
    with resumable(out, {}):
        pass
    assert out.is_dir()
    assert not out.with_name(out.name + ".partial").exists()


def refused(out: Path, match: str) -> None:
    with pytest.raises(BusyError, match=match), resumable(out, {}):
        pass


def test_a_second_job_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    output = tmp_path / "out"
    with resumable(output, {}) as folder:
        (folder / "chunk").touch()
        job = f"out.partial is being written by process {os.getpid()} on {socket.gethostname()}"
        refused(output, f"{job}, SLURM job 4711$")
    assert (output / "chunk").exists()


def test_another_process_is_refused_with_its_slurm_job_at_once(tmp_path):
    process = holding(tmp_path / "out", SLURM_JOB_ID="17")
    began = time.monotonic()
    refused(tmp_path / "out", f"process {process.pid} on {socket.gethostname()}, SLURM job 17$")
    assert time.monotonic() - began < 5
    process.kill()
    process.wait()


def test_the_slurm_job_of_an_earlier_holder_is_not_named(tmp_path):
    path = far(tmp_path / "out")
    path.with_suffix(".json").write_text(json.dumps({"token": "other", "job": "17"}))
    refused(tmp_path / "out", r"process 1 on far$")
    path.with_suffix(".json").write_text('{"token"')
    refused(tmp_path / "out", r"process 1 on far$")


def test_a_killed_process_is_taken_over_at_once(tmp_path, caplog):
    caplog.set_level("INFO")
    process = holding(tmp_path / "out")
    process.kill()
    process.wait()
    began = time.monotonic()
    free(tmp_path / "out")
    assert time.monotonic() - began < 5
    assert f"was left by process {process.pid} on" in caplog.text


def test_a_zombie_is_taken_over_at_once(tmp_path):
    """A killed job that its parent never reaps, as in a container whose PID 1 is no init."""
    process = holding(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert os.kill(process.pid, 0) is None
    free(tmp_path / "out")
    process.wait()


def test_sigterm_releases(tmp_path):
    process = holding(tmp_path / "out")
    assert marker(tmp_path / "out").exists()
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not marker(tmp_path / "out").exists()
    assert (tmp_path / "out.partial/content").is_dir()


def test_a_reused_pid_is_taken_over(tmp_path):
    """As in a container that was restarted: this process itself may have the PID."""
    with resumable(tmp_path / "out", {}):
        mine = SoftFileLease(marker(tmp_path / "out")).owner
    same = {"host": mine.hostname, "pid": os.getpid()}
    far(tmp_path / "out", **same, start=mine.start)
    refused(tmp_path / "out", f"process {os.getpid()}")
    far(tmp_path / "out", **same, start=mine.start - 1)
    free(tmp_path / "out")


def test_another_host_is_refused_while_it_refreshes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXPIRES", 1.0)
    monkeypatch.setattr(module, "HEARTBEAT", 0.2)
    monkeypatch.setattr(module, "POLL", 0.05)
    path = far(tmp_path / "out", duration=1.0)
    refused(tmp_path / "out", "process 1 on far")
    old = time.time() - 100
    os.utime(path, (old, old))
    began = time.monotonic()
    free(tmp_path / "out")
    assert time.monotonic() - began >= 1


def test_another_host_whose_clock_is_behind_is_not_taken_over(tmp_path, monkeypatch):
    """Its marker looks old all the time, but changes."""
    monkeypatch.setattr(module, "EXPIRES", 1.0)
    monkeypatch.setattr(module, "HEARTBEAT", 0.2)
    path = far(tmp_path / "out", duration=1.0)
    sleep = time.sleep

    def refresh(seconds: float) -> None:
        old = time.time() - 100
        os.utime(path, (old, old))
        sleep(seconds)

    refresh(0)
    monkeypatch.setattr(module.time, "sleep", refresh)
    refused(tmp_path / "out", "process 1 on far")


@pytest.mark.parametrize("text", ["", "filelock/2\npid=1\nho"])
def test_a_marker_whose_writer_was_killed_is_taken_over(tmp_path, text):
    far(tmp_path / "out").write_text(text)
    free(tmp_path / "out")


def test_a_job_that_lost_its_lease_does_not_publish(tmp_path):
    output = tmp_path / "out"

    def lose() -> None:
        with resumable(output, {}):
            marker(output).unlink()
            far(output)

    with pytest.raises(BusyError, match="taken over"):
        lose()
    assert not output.exists()
    assert marker(output).exists()  # that of the other job


def test_the_marker_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    with resumable(tmp_path / "out", {}):
        path = marker(tmp_path / "out")
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_that_waits_goes_on_when_the_other_has_finished(tmp_path, caplog):
    caplog.set_level("INFO")
    process = holding(tmp_path / "out")
    path = marker(tmp_path / "out")
    sleep = time.sleep

    def finish(seconds: float) -> None:
        process.terminate()
        sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "sleep", finish)
        with lease(path, "raw", wait=True):
            assert process.wait() == 128 + signal.SIGTERM
    assert f"raw: waiting for process {process.pid} on" in caplog.text
    assert not path.exists()
