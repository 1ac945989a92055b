"""Functions in processes of their own, without importing torch again."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import flame

# Forking from a server is safe, unlike forking this process, which has threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flame.embed", "flame.train", "flame.towers.long_clip"])


def start(target: Callable[..., None], *args: object) -> multiprocessing.Process:
    """Start a process that runs a function of a module."""
    # The server does not inherit sys.path, and ignores failed imports silently.
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(flame.__file__).parents[1])):
        forkserver.ensure_running()
    process = _CONTEXT.Process(target=target, args=args)
    process.start()
    return process
