"""How much of a batch a GPU can take at a time, measured before the data is read.

Shapes: B images of this process, K facets of a step, D width of the shared space.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flame.runtime.device import dtype_of
from flame.study.settings import Training
from flame.towers.base import Outputs, Tower
from flame.training.loss import step_loss
from flame.training.processes import Place, batch_norms, largest
from flame.training.speed import Speed, check, check_compiler

USABLE = 0.9  # of free memory; the rest is for NCCL, and lost between tensors of unlike sizes
PROBES = 8, 24  # images
SMALLEST = 32  # images; smaller micro-batches leave a GPU idle, and checkpointing costs no more
STATE_BYTES = 16  # of a trained parameter: weight, gradient and two moments of AdamW in float32
AVERAGE_BYTES = 4  # of a parameter whose moving average is kept


@dataclass(frozen=True)
class Need:
    """Memory of a training step, in bytes.

    Args:
        fixed: of weights, optimizer, and the features and the loss of the whole batch.
        image: of the activations of an image and its texts.
    """

    fixed: float
    image: float


def settle(
    speed: Speed, tower: Tower, settings: Training, facets: Sequence[tuple[str, str]], place: Place
) -> Speed:
    """Speed settings of which none is auto, the same in all processes.

    Args:
        speed: the settings.
        tower: to be trained; it stays as it is.
        settings: the run.
        facets: (caption kind, facet) of each target facet.
        place: of this process.

    Raises:
        ValueError: the tower cannot be trained with these settings, or not even one image fits.
    """
    images = settings.recipe.batch_size // place.processes
    check(speed, tower, images)
    check_compiler(speed.compile, place.device)
    if place.device.type != "cuda" or "auto" not in (speed.micro_batch, speed.grad_checkpointing):
        micro_batch = images if speed.micro_batch == "auto" else min(speed.micro_batch, images)
        checkpointing = "never" if speed.grad_checkpointing == "auto" else speed.grad_checkpointing
        return replace(speed, micro_batch=micro_batch, grad_checkpointing=checkpointing)
    whole_only = bool(batch_norms(tower))
    ways = [speed.grad_checkpointing]
    if speed.grad_checkpointing == "auto":
        ways = ["never", "always"] if not whole_only and _can_checkpoint(tower) else ["never"]
    free = _free(place.device)

    def need(checkpointing: str) -> tuple[float, Need]:
        how = {"checkpointed": checkpointing == "always"}
        found = measure(tower, settings, facets, place.device, images, **how)
        least, fixed, image = largest([-free, found.fixed, found.image], place.device)
        return -least, Need(fixed, image)

    return choose(speed, images, ways, need, whole_only=whole_only)


def choose(
    speed: Speed,
    images: int,
    ways: Sequence[Literal["auto", "always", "never"]],
    need: Callable[[str], tuple[float, Need]],
    *,
    whole_only: bool = False,
) -> Speed:
    """Speed settings with which a batch fits a GPU, in as few micro-batches as possible.

    Args:
        speed: the settings, of which some are auto.
        images: B.
        ways: values of grad_checkpointing to choose from; the first one that will do.
        need: value of grad_checkpointing -> bytes of free memory, and what a step needs.
        whole_only: whether the tower must see all images at once.

    Raises:
        ValueError: the batch does not fit.
    """
    auto = speed.micro_batch == "auto"
    most = images if speed.micro_batch == "auto" else min(speed.micro_batch, images)
    enough = min(most, SMALLEST) if auto and not whole_only else most
    for way in ways:
        free, found = need(way)
        fit = int((USABLE * free - found.fixed) // found.image)
        if fit >= enough:
            break
    if fit < (images if whole_only else 1):
        raise ValueError(_too_small(images, free, found, way, whole_only=whole_only))
    if auto and fit < images:
        parts = -(-images // fit)
        most = -(-images // parts)
    return replace(speed, micro_batch=most, grad_checkpointing=way)


def _can_checkpoint(tower: Tower) -> bool:
    try:
        copy.deepcopy(tower).checkpoint_activations()
    except ValueError:
        return False
    return True


def _too_small(
    images: int, free: float, need: Need, checkpointing: str, *, whole_only: bool
) -> str:
    gb = 1e9
    one = "BatchNorm needs all at once" if whole_only else "not even a micro_batch of 1 fits"
    return (
        f"the batch of {images} images a process does not fit the GPU: {need.fixed / gb:.1f} GB "
        f"and {need.image / gb:.3f} GB an image (grad_checkpointing {checkpointing}) of "
        f"{free / gb:.1f} GB free; {one}; use more processes, or a GPU with more memory"
    )


def measure(
    tower: Tower,
    settings: Training,
    facets: Sequence[tuple[str, str]],
    device: torch.device,
    images: int,
    *,
    checkpointed: bool,
) -> Need:
    """Measure the need of a step on a GPU, with a copy of the tower and random input.

    With several processes all call this at once: the loss gathers features.

    Args:
        tower: to be trained.
        settings: the run.
        facets: (caption kind, facet) of each target facet.
        device: the GPU.
        images: B.
        checkpointed: whether activations are recomputed.

    Raises:
        ValueError: not even the copy fits, or the loss of the whole batch.
    """
    with _features_fit(images):
        asked = settings.recipe.facets_per_step
        columns = torch.arange(len(facets) if asked == "all" else asked, device=device)
        probe = copy.deepcopy(tower).to(device).train()
        probe.match(facets)
        probe.to(device)
        if checkpointed:
            probe.checkpoint_activations()
        size = probe.image_size
        bfloat16 = dtype_of(settings.recipe.precision, device) == torch.bfloat16

        def step(number: int) -> None:
            pixels = torch.rand(number, 3, size, size, device=device)
            texts = probe.example_texts(number, len(columns)).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                outputs = probe(pixels, texts, columns)
            torch.stack([each.float().sum() for each in outputs[:2]]).sum().backward()

        few, many = PROBES
        step(few)  # libraries allocate their workspaces, and gradients appear
        small, large = (_peak(partial(step, number), device) for number in PROBES)
        image = (large - small) / (many - few)
        loss = _peak(partial(_loss, probe, settings, facets, columns, images), device)
        texts = probe.example_texts(1, len(columns))
        batch = images * (3 * size**2 + texts.numel() * texts.element_size())
        parameter = STATE_BYTES + (AVERAGE_BYTES if settings.recipe.ema else 0)
        state = parameter * sum(each.numel() for each in probe.parameters())
        return Need(state + max(0.0, small - few * image) + loss + batch, image)


@contextmanager
def _features_fit(images: int) -> Iterator[None]:
    """Say in one line that a measurement runs out of GPU memory; free what it held."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the features of a batch of {images} images a process do not fit the GPU: {error}"
        ) from error
    finally:
        torch.cuda.empty_cache()


def _loss(
    tower: Tower,
    settings: Training,
    facets: Sequence[tuple[str, str]],
    columns: Tensor,
    images: int,
) -> None:
    """Loss and gradient of random features of a whole batch."""
    device = columns.device
    outputs = Outputs(
        torch.randn(images, tower.dim, device=device, requires_grad=True),
        torch.randn(
            images, len(columns), tower.dim, device=device, requires_grad=tower.trains_texts
        ),
        torch.ones((), device=device, requires_grad=True),
        torch.zeros((), device=device),
    )
    step_loss(settings, facets)(outputs, columns.cpu()).backward()


def _free(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that a call takes on a GPU beyond those that are allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def explained(speed: Speed, images: int) -> Iterator[None]:
    """Say in one line which setting helps a training that runs out of GPU memory in this block.

    Args:
        speed: settings of the training.
        images: in the batch of a process.

    Raises:
        ValueError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory with {images} images a process, micro_batch {speed.micro_batch}, "
            f"grad_checkpointing {speed.grad_checkpointing}: set a smaller micro_batch, or "
            f"grad_checkpointing always ({str(error).splitlines()[0]})"
        ) from error
