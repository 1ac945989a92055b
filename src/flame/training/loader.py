"""Batches in order, read ahead by worker processes."""

from torch.utils.data import DataLoader

from flame.training.batches import Batch, Schedule


def loader(
    batches: Schedule, *, first: int = 0, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Loader of the batches from step `first` on.

    Args:
        batches: of the run.
        first: step to begin with.
        workers: processes that prefetch images; none if all images are in memory.
        pin_memory: whether batches are in pinned memory, for copies to a GPU.
    """
    workers = 0 if batches.cached else workers
    return DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(first, len(batches)),
        num_workers=workers,
        # Zarr runs a thread, and a child forked from a threaded process may hang.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=pin_memory,
    )
