"""Training loop of a tower: steps, log, checkpoints, resuming."""

import hashlib
import logging
import math
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flame.runtime import progress
from flame.runtime.device import dtype_of
from flame.runtime.resumable import write_atomic
from flame.study.settings import Training
from flame.towers.base import Outputs, Tower
from flame.training import memory, microbatch, processes
from flame.training.augment import crop, draw_crops
from flame.training.batches import Batch, Schedule, generator
from flame.training.clock import Clock
from flame.training.log import Log
from flame.training.loss import step_loss
from flame.training.monitor import Monitor
from flame.training.optim import (
    adamw,
    average,
    learning_rate,
    load_state_tensors,
    state_tensors,
)
from flame.training.processes import Place
from flame.training.speed import DEFAULT, Speed, fast_products

log = logging.getLogger(__name__)

LOG_LINES = 500  # per run, approximately


class Numbers:
    """Numbers on their way from the device, which does not wait until they are read."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied:
            self._copied.record()

    def read(self) -> list[float]:
        """Wait for the numbers."""
        if self._copied:
            self._copied.synchronize()
        return self._values.tolist()


class Trainer:
    """State of a training run between two steps, as saved in a checkpoint."""

    def __init__(
        self,
        tower: Tower,
        batches: Schedule,
        settings: Training,
        folder: Path,
        place: Place,
        speed: Speed = DEFAULT,
    ) -> None:
        """Prepare a run, and resume it if its folder holds a checkpoint.

        Args:
            tower: before the first step.
            batches: of this process.
            settings: the run.
            folder: for the log and the checkpoint.
            place: of this process.
            speed: what the machine decides.

        Raises:
            ValueError: the recipe does not fit the data, or the checkpoint is corrupt.
        """
        recipe = settings.recipe
        if recipe.warmup_steps >= len(batches):
            raise ValueError(f"warmup_steps {recipe.warmup_steps} of only {len(batches)} steps")
        self.settings, self.batches = settings, batches
        self.folder, self.place = folder, place
        tower.match(batches.facets)
        self._step_loss = step_loss(settings, batches.facets)
        self.speed = memory.settle(speed, tower, settings, batches.facets, place)
        processes.sync_batch_norm(tower, place)
        self.tower = tower.to(place.device).train()
        self._average: Any = average(self.tower, recipe)
        self.wrapped = self._wrap()
        self.bfloat16 = dtype_of(recipe.precision, place.device) == torch.bfloat16
        self.optimizer: Any = adamw(tower, recipe)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self._running: deque[tuple[int, float, Numbers]] = deque()
        self._broken = torch.zeros((), dtype=torch.bool, device=place.device)
        self._told: int | None = None
        self.checkpoint = folder / "checkpoint.safetensors"
        if self.checkpoint.exists():
            self._restore()
        seen = processes.gather(torch.tensor([self.step], device=place.device)).tolist()
        if len(set(seen)) > 1:
            raise ValueError(
                f"processes see checkpoints of steps {seen} in {folder}: is it shared?"
            )

    @property
    def result(self) -> Tower:
        """The tower that is evaluated and saved: that of the averaged weights, if there are any."""
        return self.tower if self._average is None else self._average.module

    def _wrap(self) -> Tower | DistributedDataParallel:
        """The tower, wrapped to average gradients; sets up how it computes."""
        if self.speed.grad_checkpointing == "always":
            self.tower.checkpoint_activations()
        if self.speed.compile != "none":
            self.tower.compile_visual(self.speed.compile)
        if not dist.is_initialized():
            return self.tower
        return DistributedDataParallel(self.tower, gradient_as_bucket_view=True)

    def run(self, loader: Iterable[Batch], monitor: Monitor | None = None) -> None:
        """Run the remaining steps.

        Args:
            loader: their batches.
            monitor: what is done between steps; nothing by default.
        """
        recipe, steps = self.settings.recipe, len(self.batches)
        every = max(1, steps // LOG_LINES)
        clock = Clock(self.seconds, recipe.batch_size, self.place.device)
        monitor = monitor or Monitor(self.folder, self.batches, self.place)
        done, total = self.step * recipe.batch_size, steps * recipe.batch_size
        title = f"train {self.settings.run}"
        with (
            Log(self.folder, self.step, self.place) as lines,
            _stop_signal() as stopping,
            progress.bar(total, "images", title, done=done, shown=self.place.rank == 0) as bar,
            monitor.profiled() as profiled,
        ):
            with clock.stopped():
                monitor.start(self.step, lines)

            def record(left: int) -> None:
                """Wait for the steps that are running, but for the last ones."""
                while len(self._running) > left:
                    line = self.finish()
                    self.seconds = clock.seconds
                    bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
                    bar.update(recipe.batch_size)
                    if line["step"] % every == 0 or line["step"] == steps:
                        lines.write(line | clock.rates())

            for batch in clock.waiting(loader):
                self.begin(batch, stop=stopping.is_set())
                record(left=1)
                due, stop = clock.due(60 * recipe.checkpoint_minutes), self._stops(stopping)
                if due or stop or self.step % self.batches.steps_per_epoch == 0:
                    record(left=0)
                profiled()
                with clock.stopped():
                    monitor.after(self.step, lines)
                if due or stop:
                    self._save()
                if stop:
                    sys.exit(128 + signal.SIGTERM)
            record(left=0)
        if self.place.rank == 0:
            log.info("%s", clock.summary())

    def _stops(self, stopping: threading.Event) -> bool:
        """Whether to stop after this step. The signal may reach processes at different steps."""
        if self.place.processes == 1:
            return stopping.is_set()
        # All have read the numbers of the step before, and some those of this one.
        return self._told is not None and self.step > self._told

    def advance(self, batch: Batch) -> dict[str, float]:
        """Run one step and wait for it; see `begin` and `finish`."""
        self.begin(batch)
        return self.finish()

    def begin(self, batch: Batch, *, stop: bool = False) -> None:
        """Start a step. The device computes it while the CPU goes on.

        A step whose loss or gradient is not finite changes no weights, nor does any that follows
        before `finish` finds out.

        Args:
            batch: of the step.
            stop: whether this process was told to stop.

        Raises:
            ValueError: the GPU is out of memory.
        """
        bfloat16_on_gpu = self.bfloat16 and self.place.device.type == "cuda"
        images = len(batch.images)
        with memory.explained(self.speed, images), fast_products(bfloat16_on_gpu):
            self._begin(batch, stop)

    def _begin(self, batch: Batch, stop: bool) -> None:
        recipe = self.settings.recipe
        lr = learning_rate(self.step, len(self.batches), recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, scale = self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.tower.parameters(), recipe.gradient_clip or math.inf)
        loss, told = processes.mean(torch.stack([loss, torch.full_like(loss, stop)])).unbind()
        self._broken = self._broken | ~(loss + norm).isfinite()
        self.optimizer.found_inf = self._broken.float()  # the fused kernel then does nothing
        numbers = Numbers(torch.stack([loss, norm, scale, told]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tower.clamp_scale()
        if self._average is not None:
            self._average.update_parameters(self.tower)
        self._running.append((self.step, lr, numbers))
        self.step += 1

    def finish(self) -> dict[str, float]:
        """Wait for the first of the steps that are running.

        Returns:
            Its line of the log.

        Raises:
            ValueError: its loss or its gradient is not finite.
        """
        step, lr, numbers = self._running.popleft()
        self.loss, grad_norm, inverse_tau, told = numbers.read()
        line = {
            "step": step + 1,
            "epoch": step // self.batches.steps_per_epoch + 1,
            "loss": self.loss,
            "tau": 1 / inverse_tau,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if not math.isfinite(self.loss + grad_norm):
            raise ValueError(f"not finite: {line}; {self._last_checkpoint()}")
        if told and self._told is None:
            self._told = step + 1
        return line

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the gradient of a batch to the parameters; returns the loss and 1/tau.

        The randomness of a step depends on its number only, so a checkpoint holds no RNG state.
        Crops are the same in any number of processes and micro-batches, which draw those of the
        whole batch. Dropout and stochastic depth differ.
        """
        device, augment = self.place.device, self.settings.recipe.augment
        images, texts, columns = (each.to(device, non_blocking=True) for each in batch)
        parts = microbatch.split(len(images), self.speed.micro_batch)
        purpose = self.settings.seed, self.step
        crops = draw_crops(
            len(images),
            (images.shape[-2], images.shape[-1]),
            generator("augment", *purpose, 0),
            scale=augment.scale,
            shift=augment.shift,
            rank=self.place.rank,
            processes=self.place.processes,
        )
        if crops is not None:
            crops = crops.to(device, non_blocking=True)

        def forward(module: nn.Module, number: int) -> Outputs:
            part = parts[number]
            own = (number,) if number else ()
            torch.manual_seed(generator("dropout", *purpose, self.place.rank, *own).initial_seed())
            pixels = crop(images[part], None if crops is None else crops[part])
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                return module(pixels, texts[part], columns)

        def loss(outputs: Outputs) -> Tensor:
            return self._step_loss(outputs, batch.columns)

        return microbatch.backward(self.wrapped, forward, len(parts), loss)

    def _last_checkpoint(self) -> str:
        if not self.checkpoint.exists():
            return "there is no checkpoint yet"
        step = self._checkpoint_numbers()["step"]
        return f"last checkpoint with finite weights: {self.checkpoint}, step {step}"

    def _checkpoint_numbers(self) -> dict[str, str]:
        with safe_open(self.checkpoint, "pt") as file:
            return file.metadata()

    def _save(self) -> None:
        if self.place.rank != 0:
            return
        tensors = state_tensors(self.tower, self.optimizer, self._average)
        numbers = {
            "step": str(self.step),
            "seconds": str(self.seconds),
            "loss": repr(self.loss),
            "sha256": _digest(tensors),
        }
        write_atomic(self.checkpoint, lambda path: save_file(tensors, path, numbers))

    def _restore(self) -> None:
        corrupt = f"{self.checkpoint} is corrupt: delete it to restart the run"
        try:
            tensors = load_file(self.checkpoint, device=str(self.place.device))
            numbers = self._checkpoint_numbers()
        except SafetensorError as error:
            raise ValueError(f"{corrupt} ({error})") from error
        if numbers.get("sha256") != _digest(tensors):
            raise ValueError(f"{corrupt} (its tensors do not match their checksum)")
        load_state_tensors(self.tower, self.optimizer, tensors, self._average)
        self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])
        self.loss = float(numbers["loss"])


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Turns SIGTERM into a flag, so that training stops between two steps."""
    stopping = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
