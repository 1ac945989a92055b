"""Batches in order, read ahead by worker processes in items of a few images.

A worker gets an item with all that it takes to read it, and holds no data of its own, so its memory
does not depend on the size of the data set. The batches are the same, to the bit, for any number of
workers.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flame.training.batches import Batch, Schedule, WorkItem, read

ITEM = 64  # images
ITEMS_AHEAD = 2  # read by each worker beyond what the main process has asked for
DEADLINE = 600.0  # seconds for one item, including the start of the workers
PATIENCE = 5.0  # seconds, after which to look whether a worker died
SHARED_MEMORY = Path("/dev/shm")
SIGNALS = {signal.SIGINT, signal.SIGTERM}

Read = tuple[Tensor, ...] | ValueError | OSError


class Item(Protocol):
    """What a worker is given to read."""

    def read(self) -> tuple[Tensor, ...]:
        """Tensors, such as those of `WorkItem`."""
        ...


@contextmanager
def loader(
    schedule: Schedule, *, first: int = 0, workers: int = 0, pin_memory: bool = False
) -> Iterator[Iterable[Batch]]:
    """Batches from step `first` on, as long as the context is open.

    Args:
        schedule: of the run.
        first: step to begin with.
        workers: processes that read ahead; none if all images are in memory.
        pin_memory: whether batches are in pinned memory, for copies to a GPU.

    Raises:
        ValueError: a worker met broken data.
        OSError: a worker found no room in shared memory, or read nothing for `DEADLINE` seconds.
    """
    steps = range(first, len(schedule))
    if schedule.cached or not workers:
        now = (read(schedule, step) for step in steps)
        yield map(_pinned, now) if pin_memory else now
        return
    closed = Event()
    with ThreadPoolExecutor(1, "batches") as thread:
        # Started there, because torch would otherwise raise errors of workers at any place of the
        # main thread, such as in the middle of saving a checkpoint.
        readers = thread.submit(Workers, _Items(schedule, steps), workers).result()
        try:
            yield _one_ahead(_assembled(schedule, steps, readers, closed, pin_memory), thread)
        finally:
            closed.set()
            thread.submit(readers.close).result()


def _pinned(batch: Batch) -> Batch:
    return Batch(*(tensor.pin_memory() for tensor in batch))


def _slices(schedule: Schedule) -> Iterator[slice]:
    """Rows of each item of a batch."""
    size = schedule.local_batch_size
    return (slice(start, min(start + ITEM, size)) for start in range(0, size, ITEM))


class _Items:
    """Work items of all remaining batches, in order."""

    def __init__(self, schedule: Schedule, steps: range) -> None:
        self._schedule, self._steps = schedule, steps

    def __iter__(self) -> Iterator[WorkItem]:
        schedule = self._schedule
        return (schedule.item(step, rows) for step in self._steps for rows in _slices(schedule))


class _Reader(Dataset[Read]):
    """What a worker does: reads the item that it is given. Holds nothing."""

    def __getitem__(self, item: Item) -> Read:
        """Its tensors in shared memory, or the error that tells the user what is wrong."""
        try:
            return _shared(item.read())
        except (ValueError, OSError) as error:
            return error


def _shared(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Move tensors to shared memory here.

    Torch would do so in a thread that loses the item if there is no room, and the main process
    would wait for it forever.
    """
    try:
        return tuple(tensor.share_memory_() for tensor in found)
    except RuntimeError as error:
        need = sum(tensor.nbytes for tensor in found) / 1e6
        raise OSError(f"no room for {need:.0f} MB in {_shared_memory()}") from error


def _shared_memory() -> str:
    """Name and size of the shared memory, and what helps if it is full."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY}, which has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free: "
        "enlarge it (docker run --shm-size=8g, or --ipc=host), or use fewer --workers"
    )


class Workers:
    """Processes that read items ahead, in order."""

    def __init__(self, items: Iterable[Item], workers: int, *, reused: bool = False) -> None:
        """Start them.

        Args:
            items: to read.
            workers: number of processes.
            reused: whether they stay when all is read, for `restart`.
        """
        self._source: DataLoader[Read] = DataLoader(
            _Reader(),
            batch_size=None,
            sampler=items,
            num_workers=workers,
            persistent_workers=reused,
            prefetch_factor=ITEMS_AHEAD,
            timeout=PATIENCE,
            # Zarr runs a thread, and a child forked from a threaded process may hang.
            multiprocessing_context="spawn",
            worker_init_fn=partial(_start, os.getpid()),
        )
        others = set(active_children())
        with _starting():
            self._items: Any = iter(self._source)
        self._processes = set(active_children()) - others

    def restart(self) -> None:
        """Read again what the items given at the start are now."""
        self._items = iter(self._source)

    def read(self, closed: Event) -> tuple[Tensor, ...] | None:
        """The next item, in order; None if `closed` is set meanwhile."""
        deadline = time.monotonic() + DEADLINE
        while not closed.is_set():
            try:
                found = next(self._items)
            except RuntimeError as error:  # torch's, also if a worker was killed
                if "timed out" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no worker has read {ITEM} images within {DEADLINE:.0f} s: the disk "
                        f"hangs, or there is too little room in {_shared_memory()}"
                    ) from error
                continue
            if isinstance(found, Exception):
                raise found
            return found
        return None

    def close(self) -> None:
        """End the processes."""
        # Deleting the iterator would do, unless the traceback of an error still refers to it. Torch
        # then takes a process that is killed below for a failure, of whatever runs next.
        self._items._shutdown_workers()
        del self._items, self._source
        for process in self._processes:  # those that hang, as in a read from a dead network disk
            with suppress(ValueError):  # already ended
                process.kill()


def _start(parent: int, worker: int) -> None:
    """First call in a worker, which from then on watches its parent."""
    torch.set_num_threads(1)
    if os.getppid() != parent:  # it died in the meantime
        os._exit(1)


@contextmanager
def _starting() -> Iterator[None]:
    """Processes that are spawned in this context ignore SIGTERM and SIGINT, and import no program.

    A scheduler sends SIGTERM to all processes of a job. The training then saves a checkpoint and
    ends its workers; torch would take the death of a worker for an error.

    Spawned processes import the main module. That of a training takes 240 MB and three times as
    long as torch alone, and items come from other modules.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    # The mask is that of this thread, and is inherited by the processes that it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _assembled(
    schedule: Schedule, steps: range, workers: Workers, closed: Event, pin_memory: bool
) -> Iterator[Batch]:
    """Whole batches. Ends early when `closed` is set."""
    size = schedule.local_batch_size
    for step in steps:
        whole: list[Tensor] = []
        for rows in _slices(schedule):
            found = workers.read(closed)
            if found is None:
                return
            whole = whole or [
                torch.empty(size, *part.shape[1:], dtype=part.dtype, pin_memory=pin_memory)
                for part in found
            ]
            for tensor, part in zip(whole, found, strict=True):
                # NumPy copies in this thread alone; torch would use a thread for each core.
                tensor.numpy()[rows] = part.numpy()
        yield Batch(whole[0], whole[1], schedule.columns(step))


def _one_ahead(batches: Iterator[Batch], thread: ThreadPoolExecutor) -> Iterator[Batch]:
    """The same batches; the next one is assembled while the caller works with one."""
    following = thread.submit(next, batches, None)
    while (batch := following.result()) is not None:
        following = thread.submit(next, batches, None)
        yield batch
