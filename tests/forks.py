"""Processes of their own for tests, in which torch need not be imported again."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import flame

# A fork server imports once for all, and, unlike a fork of this process, safely.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flame.embed", "flame.train", "flame.towers.long_clip"])


def start(target: Callable[..., None], *args: object) -> multiprocessing.Process:
    """A process that runs a function of a module."""
    # The server does not take over sys.path, and is silent about what it could not import.
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(flame.__file__).parents[1])):
        forkserver.ensure_running()
    process = _CONTEXT.Process(target=target, args=args)
    process.start()
    return process
