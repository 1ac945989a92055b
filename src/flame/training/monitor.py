"""What a training does between its steps: validation, weights of some epochs, a profile.

None of it changes the weights that are trained, so none of it is part of a run's settings.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from flame.study.settings import ValidationSettings
from flame.training import profiling
from flame.training.batches import Schedule
from flame.training.log import Log
from flame.training.processes import Place

log = logging.getLogger(__name__)

EPOCHS = "epochs"  # folder of the kept weights, in that of the run
ASIDE = ".partial"  # ending of a folder that is being written

Metrics = Mapping[str, Mapping[str, float]]  # benchmark -> metric -> percent


@dataclass(frozen=True)
class Monitoring:
    """What is asked of a training besides its result.

    Args:
        validation: benchmarks that the tower is evaluated on between epochs.
        validation_datasets: folders of their data sets.
        validation_stores: embedding stores of their texts, every part of every kind; for FLAME.
        keep_epochs: number of epochs whose weights are kept, each in a folder <out>/epochs/<n> that
            flame.evaluate takes: the newest ones but the last, which is the result.
        profile_steps: steps of the first process that torch's profiler records after some others,
            as trace.json.gz and profile.txt in the folder of the run.
    """

    validation: ValidationSettings = field(default_factory=ValidationSettings)
    validation_datasets: tuple[Path, ...] = ()
    validation_stores: tuple[Path, ...] = ()
    keep_epochs: int = 0
    profile_steps: int = 0


NOTHING = Monitoring()


class Monitor:
    """Validates a run, keeps weights at the ends of epochs, and profiles some steps."""

    def __init__(
        self,
        folder: Path,
        batches: Schedule,
        place: Place,
        *,
        validate: Callable[[], Metrics] | None = None,
        every: int = 1,
        save: Callable[[Path], None] | None = None,
        keep_epochs: int = 0,
        profile_steps: int = 0,
    ) -> None:
        """Keep the arguments.

        Args:
            folder: of the run.
            batches: its steps.
            place: of this process.
            validate: measures the tower; called in all processes at once, and what the first
                returns is logged. None: never.
            every: epochs between two validations. One more comes before the first step, so that
                what is wrong with it shows before hours of training, and one after the last.
            save: writes the tower in an existing folder.
            keep_epochs: number of epochs whose weights are kept, the newest ones but the last
                epoch's, which are the result.
            profile_steps: number of steps to profile.
        """
        self._run, self._folder, self._place = folder, folder / EPOCHS, place
        self._per_epoch, self._steps = batches.steps_per_epoch, len(batches)
        self._validate, self._every = validate, every
        self._save, self._keep, self._profile = save, keep_epochs, profile_steps

    def profiled(self) -> AbstractContextManager[Callable[[], object]]:
        """Profile of the steps in this block, which calls the function it gets after each."""
        return profiling.profiled(self._run, self._profile, self._place)

    def start(self, step: int, lines: Log) -> None:
        """Validate an untrained tower, and drop weights that are newer than the checkpoint.

        Args:
            step: number of steps that are done.
            lines: log of the run.
        """
        if self._place.rank == 0 and self._folder.exists():
            for path in self._folder.iterdir():
                if not path.name.isdigit() or int(path.name) * self._per_epoch > step:
                    shutil.rmtree(path)
        self._validated(step, lines)

    def after(self, step: int, lines: Log) -> None:
        """Validate and keep weights, if an epoch ends with this step; all processes call this."""
        if step % self._per_epoch == 0:
            self._kept(step // self._per_epoch)
            self._validated(step, lines)

    def _validated(self, step: int, lines: Log) -> None:
        epoch, rest = divmod(step, self._per_epoch)
        due = rest == 0 and (epoch % self._every == 0 or step == self._steps)
        if self._validate is None or not due or step in lines.validated:
            return
        started = time.monotonic()
        found = self._validate()
        seconds = round(time.monotonic() - started, 1)
        lines.write({"step": step, "epoch": epoch, "seconds": seconds, "validation": found})
        if self._place.rank == 0:
            log.info("validation after epoch %d: %s", epoch, _told(found))

    def _kept(self, epoch: int) -> None:
        """Keep the weights of an epoch and drop those of the oldest; the last is the result."""
        if self._save is None or not self._keep or self._place.rank != 0:
            return
        if epoch * self._per_epoch < self._steps:
            aside = self._folder / f"{epoch}{ASIDE}"
            aside.mkdir(parents=True)
            self._save(aside)
            aside.rename(self._folder / str(epoch))
            for path in self._folder.iterdir():
                if int(path.name) <= epoch - self._keep:
                    shutil.rmtree(path)


def _told(found: Metrics) -> str:
    """All metrics in one line."""
    return "; ".join(
        f"{benchmark} " + ", ".join(f"{name} {value:.1f} %" for name, value in metrics.items())
        for benchmark, metrics in found.items()
    )
