"""Time of a training run: throughput, and the share of it spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from flame.training.batches import Batch


class Clock:
    """Measures a run; what is done while it is stopped is in its seconds, but not in its rates."""

    def __init__(self, before: float, batch_size: int, device: torch.device) -> None:
        """Start the clock.

        Args:
            before: seconds of interrupted runs.
            batch_size: images of a step, over all processes.
            device: whose memory is measured.
        """
        self._start = time.monotonic() - before
        self._saved = self._read = time.monotonic()
        self._waited, self._steps = 0.0, 0
        self._batch_size, self._device = batch_size, device
        self._trained = self._trained_waiting = 0.0
        self._trained_steps = 0

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return time.monotonic() - self._start

    def waiting(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Batches of a loader; measures the time spent waiting for them."""
        batches = iter(loader)
        while True:
            begin = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.monotonic() - begin
            self._steps += 1
            yield batch

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what is done in this block."""
        begin = time.monotonic()
        yield
        self._read += time.monotonic() - begin

    def rates(self) -> dict[str, float]:
        """Rates since the last call.

        Returns:
            Images per second, the share of time spent waiting for data and, on a GPU, the largest
            memory that tensors of this process took since its start, in GB.
        """
        span = time.monotonic() - self._read
        rates = {
            "images_per_second": round(self._steps * self._batch_size / span, 1),
            "data_wait": round(self._waited / span, 4),
        }
        if self._device.type == "cuda":
            rates["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(self._device) / 1e9, 2)
        self._trained += span
        self._trained_steps += self._steps
        self._trained_waiting += self._waited
        self._read += span
        self._waited, self._steps = 0.0, 0
        return rates

    def summary(self) -> str:
        """Means over this process's part of the run, up to the last call of `rates`."""
        if not self._trained_steps:
            return "no step was left to train"
        rate = self._trained_steps * self._batch_size / self._trained
        waiting = self._trained_waiting / self._trained
        return f"{self._trained_steps} steps: {rate:.1f} images/s, {waiting:.1%} waiting for data"

    def due(self, seconds: float) -> bool:
        """Whether this many seconds have passed since this was last true."""
        now = time.monotonic()
        if now - self._saved < seconds:
            return False
        self._saved = now
        return True
