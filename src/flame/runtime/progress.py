"""Progress of long jobs as log lines, readable from parallel jobs and under SLURM."""

import sys
from typing import TextIO

from tqdm import tqdm


class _Lines:
    """Writes each redraw of a bar as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def bar(
    total: int, unit: str, title: str, *, done: int = 0, seconds: float = 5.0, shown: bool = True
) -> tqdm:
    """A bar that prints a line with rate and remaining time every few seconds.

    Args:
        total: units of the whole job.
        unit: what is counted, such as "captions".
        title: name of the job, such as "embed scenes/long 1 of 2".
        done: units that an interrupted run had finished.
        seconds: time between two lines.
        shown: whether lines are printed.
    """
    return tqdm(
        total=total,
        disable=not shown,
        initial=done,
        unit=f" {unit}",
        desc=title,
        mininterval=seconds,
        file=_Lines(sys.stderr),
        position=0,  # otherwise a second bar in the process starts with line feeds
        dynamic_ncols=False,
        ncols=100,
        ascii=" .-=#",
    )
