"""A profile of some training steps, by torch's own profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from flame.training.processes import Place

TRACE, TABLE = "trace.json.gz", "profile.txt"
SKIPPED = 10  # first steps, which compile, choose kernels and fill the queues of the loader
WARM_UP = 2  # steps that are profiled and dropped: the first ones with a profiler are slow
ROWS = 60  # of the table


@contextmanager
def profiled(folder: Path, steps: int, place: Place) -> Iterator[Callable[[], object]]:
    """Profile some steps of the first process.

    Writes a trace for chrome://tracing or ui.perfetto.dev, and a table of the time and memory of
    every operator.

    Args:
        folder: of the files `TRACE` and `TABLE`.
        steps: how many are profiled, after `SKIPPED` and `WARM_UP` others; 0: none.
        place: of this process.

    Yields:
        A function to call after each step.
    """
    if steps == 0 or place.rank != 0:
        yield lambda: None
        return
    cuda = place.device.type == "cuda"

    def write(found: profile) -> None:
        found.export_chrome_trace(str(folder / TRACE))
        slowest = "self_device_time_total" if cuda else "self_cpu_time_total"
        averages = found.key_averages()
        (folder / TABLE).write_text(averages.table(sort_by=slowest, row_limit=ROWS))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(
        activities=activities,
        schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    ) as running:
        yield running.step
