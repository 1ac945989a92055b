"""Training loop of a tower: steps, log, checkpoints, resuming."""

import hashlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
from flame.training.optim import adamw, learning_rate, load_state_tensors, state_tensors
from flame.training.processes import Place
from flame.training.speed import DEFAULT, Speed, fast_products

log = logging.getLogger(__name__)

LOG_LINES = 500  # per run, approximately


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
        self.wrapped = self._wrap()
        self.bfloat16 = dtype_of(recipe.precision, place.device) == torch.bfloat16
        self.optimizer = adamw(tower, recipe)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.checkpoint = folder / "checkpoint.safetensors"
        if self.checkpoint.exists():
            self._restore()
        seen = processes.gather(torch.tensor([self.step], device=place.device)).tolist()
        if len(set(seen)) > 1:
            raise ValueError(
                f"processes see checkpoints of steps {seen} in {folder}: is it shared?"
            )

    def _wrap(self) -> Tower | DistributedDataParallel:
        """The tower, wrapped to average gradients; sets up how it computes."""
        if self.speed.grad_checkpointing == "always":
            self.tower.checkpoint_activations()
        if self.speed.compile != "none":
            self.tower.compile_visual(self.speed.compile)
        if not dist.is_initialized():
            return self.tower
        return DistributedDataParallel(
            self.tower,
            # All other buffers are constants.
            broadcast_buffers=bool(processes.batch_norms(self.tower)),
            gradient_as_bucket_view=True,
        )

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
            for batch in clock.waiting(loader):
                line = self.advance(batch)
                self.seconds = clock.seconds
                bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
                bar.update(recipe.batch_size)
                if self.step % every == 0 or self.step == steps:
                    lines.write(line | clock.rates())
                profiled()
                with clock.stopped():
                    monitor.after(self.step, lines)
                # The signal may reach processes at different steps, but all must stop at the same.
                stop = processes.any_of(stopping.is_set(), self.place.device)
                if clock.due(60 * recipe.checkpoint_minutes) or stop:
                    self._save()
                if stop:
                    sys.exit(128 + signal.SIGTERM)
        if self.place.rank == 0:
            log.info("%s", clock.summary())

    def advance(self, batch: Batch) -> dict[str, float]:
        """Run one step.

        Returns:
            Its line of the log.

        Raises:
            ValueError: the loss or the gradient is not finite, or the GPU is out of memory.
        """
        on_gpu = self.place.device.type == "cuda"
        with (
            memory.explained(self.speed, len(batch.images)),
            fast_products(self.bfloat16 and on_gpu),
        ):
            return self._advance(batch)

    def _advance(self, batch: Batch) -> dict[str, float]:
        recipe = self.settings.recipe
        lr = learning_rate(self.step, len(self.batches), recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, scale = self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.tower.parameters(), recipe.gradient_clip or math.inf)
        logged = torch.stack([processes.mean(loss), norm, scale])
        self.loss, grad_norm, inverse_tau = logged.tolist()
        line = {
            "step": self.step + 1,
            "epoch": self.step // self.batches.steps_per_epoch + 1,
            "loss": self.loss,
            "tau": 1 / inverse_tau,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if not math.isfinite(self.loss + grad_norm):
            raise ValueError(f"not finite: {line}; {self._last_checkpoint()}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tower.clamp_scale()
        self.step += 1
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
        tensors = state_tensors(self.tower, self.optimizer)
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
        load_state_tensors(self.tower, self.optimizer, tensors)
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
