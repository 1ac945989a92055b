"""Programs forked from a process that has imported their modules, and with faults on request.

Importing torch takes seconds; the tests start hundreds of programs. One process imports everything,
and every program is forked from it. After the fork it is `python -m <module>`: the same code,
arguments, streams, signals and exit status. Only on request does it differ: smaller constants, a
signal before the n-th change on disk, a limit to the size of files.

    with Preloaded(["flame.embed"]) as server:
        child = server.start("flame.embed", ["--llm", ...], cwd=folder, log=folder / "log")
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ["caption", "download", "embed", "evaluate", "export", "fewshot", "figure", "overhead"]
PROGRAMS += ["knowledge", "table", "train"]
# The stages of the workflow, and what they import while they run.
STAGES = [f"flame.{program}" for program in PROGRAMS]
STAGES += [
    "flame.data.datasets.scenes",
    "flame.embedding.checkpoints",
    "flame.evaluation.tasks.retrieval",
    "flame.towers.long_clip",
    "flame.training.tokens",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf",
    "timm",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "tyro",
]
CHANGES_DISK = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Child:
    """A program that was started; `wait` may be called once."""

    pid: int
    server: "Preloaded"

    def wait(self) -> int:
        """Exit status, or minus the number of the signal that ended it."""
        return self.server.ask(do="wait", pid=self.pid)

    def kill(self, sent: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait; until `wait`, the process id cannot be reused."""
        os.kill(self.pid, sent)
        return self.wait()


class Preloaded:
    """The process that programs are forked from.

    Args:
        modules: to import at its start.
        environment: variables that its programs see besides those of this process.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self._process = _importing(modules, environment)

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, which reads until its input ends."""
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **message: Any) -> int:
        """Send a request; its answer is a process id or an exit status."""
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        log: Path,
        constants: Mapping[str, object] = {},
        step: int | None = None,
        sends: signal.Signals = signal.SIGKILL,
        file_limit: int | None = None,
        interpreter: Path | None = None,
    ) -> Child:
        """Start a program.

        Args:
            module: such as `flame.embed`.
            arguments: of its command line.
            cwd: folder to run it in.
            log: file to which its streams are appended; a dot for every step on disk goes to
                `<log>.steps`.
            constants: dotted name -> value, such as `flame.embedding.store.SHARD_ROWS`.
            step: number of the step on disk, from 1, before which it sends itself a signal.
            sends: the signal.
            file_limit: bytes to which its files can grow.
            interpreter: its `sys.executable`, if another.
        """
        pid = self.ask(
            do="start",
            module=module,
            arguments=[*arguments],
            cwd=str(cwd),
            log=str(log),
            constants=dict(constants),
            step=step,
            sends=sends,
            file_limit=file_limit,
            interpreter=interpreter and str(interpreter),
        )
        return Child(pid, self)


_PYTHON = """#!{python} -SE
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = "\\0".join([os.getcwd(), *sys.argv[1:]])
    socket.send_fds(server, [words.encode()], [0, 1, 2])
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(9) or 1))
"""


class Interpreter:
    """A `python` that runs `python -m <module>` in a fork of a process with the modules imported.

    Jobs of the workflow that it runs see the environment of that process, not Snakemake's.

    Args:
        modules: to import at its start.
        environment: variables that its programs see besides those of this process.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self._folder = Path(tempfile.mkdtemp())  # short, as addresses of sockets have to be
        self.path, address = self._folder / "python", self._folder / "socket"
        self.path.write_text(_PYTHON.format(python=sys.executable, address=str(address)))
        self.path.chmod(0o755)
        self._process = _importing(["--listen", str(address), *modules], environment)
        while not address.exists():
            assert self._process.poll() is None
            time.sleep(0.05)

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)


def _importing(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """This file as a program; it ends when its input does."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
    )


def _serve() -> dict[str, Any] | None:
    """Answer requests: in every child with its own, in the parent with None at the end."""
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "wait":
            _, status = os.waitpid(message["pid"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                return message
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    return None


def _count_steps(cwd: str, path: str, step: int | None, sends: int) -> None:
    """From here on every change of a file or folder under `cwd` is a step."""
    steps, done = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            name, _, flags = arguments
            counts = bool(flags & WRITING) and _is_under(cwd, name)
        else:
            counts = event in CHANGES_DISK and _is_under(cwd, arguments[0])
        if counts:
            done += 1
            if done == step:
                os.kill(os.getpid(), sends)
            os.write(steps, b".")

    sys.addaudithook(hook)


def _is_under(cwd: str, name: object) -> bool:
    """A name without a folder is one of a folder that is being taken away, entry by entry."""
    path = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    return path.startswith(cwd) or (path != "" and not path.startswith("/"))


def _become(message: Mapping[str, Any]) -> None:
    """Everything of a program but its code."""
    os.setsid()
    os.chdir(message["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    for name, value in message["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant)
        setattr(importlib.import_module(module), constant, value)
    _count_steps(message["cwd"], message["log"] + ".steps", message["step"], message["sends"])
    if message["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (message["file_limit"],) * 2)
    sys.executable = message["interpreter"] or sys.executable
    sys.argv = [message["module"], *message["arguments"]]


def _run(module: str) -> int:
    """Run a module to the end as `python -m` does, and give the status that it would end with."""
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # it runs as __main__
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _leave(status: int) -> None:
    """End without taking all modules apart, which takes longer than what a tiny program does."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _listen(address: str) -> socket.socket | None:
    """Accept connections: in every child its own, in the parent None at the end of its input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            ready, _, _ = select.select([sys.stdin, server], [], [])
            if sys.stdin in ready:
                return None
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return connection
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run the program that is asked for, and reply with its exit status."""
    words, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while more := connection.recv(1 << 16):
        words += more
    folder, flag, module, *arguments = words.decode().split("\0")
    assert flag == "-m"
    program = os.fork()
    if program == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        sys.argv = [module, *arguments]
        _leave(_run(module))
    _, status = os.waitpid(program, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.send(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


if __name__ == "__main__":
    del sys.path[0]  # this folder, which `python -m` would not have
    listens = sys.argv[1] == "--listen"
    for name in sys.argv[3 if listens else 1 :]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else a child would copy every page with an object that is looked at
    if listens:
        connection = _listen(sys.argv[2])
        if connection is not None:
            _answer(connection)
        os._exit(0)
    asked = _serve()
    if asked is None:
        os._exit(0)
    _become(asked)
    _leave(_run(asked["module"]))
