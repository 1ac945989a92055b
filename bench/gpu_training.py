"""Sections of bench/gpu.py: training steps at the shapes of the paper."""

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_bench import PEAK, Bench, Sizes


def settings_of(sizes: Sizes, method: str, backbone: str, batch: int, precision: str) -> Any:
    """A run of the paper's recipe (Tables A1 and A2)."""
    from flame.study.schema.runs import Augment, Backbone, Recipe, TextTower
    from flame.study.settings import ClipTraining, FlameTraining

    recipe = Recipe(
        epochs=1,
        batch_size=batch,
        lr=5e-4,
        weight_decay=0.5,
        warmup_steps=1,
        augment=Augment(scale=(0.9, 1.0)),
        precision=precision,
        checkpoint_minutes=1e-6,
    )
    common = {
        "run": method,
        "seed": 0,
        "dataset": "random",
        "backbone": Backbone(timm=backbone, image_size=sizes.image_size),
        "recipe": recipe,
        "max_skipped": 0.0,
        "version": 0,
    }
    if method == "flame":
        facets = tuple(f"facet-{k}" for k in range(sizes.targets))
        return FlameTraining(**common, targets={"long": facets})
    width, layers, heads = sizes.text
    tower = TextTower(width=width, layers=layers, heads=heads, embed_dim=width)
    return ClipTraining(method="clip", **common, text_tower=tower, captions="raw")


class RandomBatches:
    """Batches of noise in the shapes of a run; two of them, in pinned memory, take turns."""

    cached = True

    def __init__(self, bench: Bench, settings: Any, steps: int) -> None:
        from flame.training.batches import Batch

        sizes, batch = bench.sizes, settings.recipe.batch_size
        self.steps_per_epoch, self.settings = steps, settings
        device = bench.device
        draws = torch.Generator(device).manual_seed(0)
        side, self._batches = settings.backbone.image_size, []
        for _ in range(2):
            pixels = batch, 3, side, side
            images = torch.randint(256, pixels, generator=draws, dtype=torch.uint8, device=device)
            if settings.method == "flame":
                shape = batch, sizes.targets, sizes.width
                texts = torch.randn(shape, generator=draws, dtype=torch.float16, device=device)
            else:
                words = batch, 1, 77
                texts = torch.randint(
                    1, 49000, words, generator=draws, dtype=torch.int32, device=device
                )
                texts[:, :, -1] = 49407  # the end token
            found = Batch(images.cpu(), texts.cpu(), torch.arange(texts.shape[1]))
            if bench.device.type == "cuda":
                found = Batch(*(part.pin_memory() for part in found))
            self._batches.append(found)

    @property
    def facets(self) -> list[tuple[str, str]]:
        """(caption kind, facet) of each target facet."""
        if self.settings.method == "flame":
            return [("long", facet) for facet in self.settings.targets["long"]]
        return [("raw", "tokens")]

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> Any:
        return self._batches[step % 2]


def trainer_of(
    bench: Bench, settings: Any, folder: Path, *, steps: int = 1000, place: Any = None, **speed: Any
) -> Any:
    """A trainer as `flame.train` makes it, on random batches."""
    from flame.towers.load import create
    from flame.training.processes import Place
    from flame.training.speed import Speed
    from flame.training.trainer import Trainer

    torch.manual_seed(0)
    tower = create(settings, bench.sizes.width)
    batches = RandomBatches(bench, settings, steps)
    place = place or Place(0, 1, bench.device)
    return Trainer(tower, batches, settings, folder, place, Speed(**speed))


def images_per_second(
    bench: Bench, settings: Any, *, steps: int, warm_up: int = 3, **options: Any
) -> dict[str, Any]:
    """Speed and memory of a run's steps, as `Trainer.run` takes them."""
    from flame.report.costs import tower_cost

    with tempfile.TemporaryDirectory() as folder:
        bench.peak_gb()
        trainer = trainer_of(bench, settings, Path(folder), **options)
        for _ in range(warm_up):  # the first steps choose kernels, and compile
            trainer.advance(trainer.batches[trainer.step])
        bench.sync()
        start = time.perf_counter()
        for number in range(steps):
            trainer.begin(trainer.batches[trainer.step])
            if number:  # the CPU is one step ahead
                trainer.finish()
        trainer.finish()
        bench.sync()
        rate = steps * settings.recipe.batch_size / (time.perf_counter() - start)
    flop = 3 * tower_cost(settings, bench.sizes.width).forward
    return {
        "value": rate,
        "unit": "images/s",
        "batch": settings.recipe.batch_size,
        "micro_batch": trainer.speed.micro_batch,
        "grad_checkpointing": trainer.speed.grad_checkpointing,
        "mfu": rate * flop / PEAK,
        "gb": bench.peak_gb(),
    }


def train(bench: Bench) -> None:
    """Steps of ViT-B/16 at the share of one GPU, beside those of open_clip's CLIP."""
    sizes = bench.sizes

    def run(method: str) -> Any:
        return settings_of(sizes, method, sizes.backbone, sizes.batch, "auto")

    ways = {
        "FLAME": ("flame", {}),
        "FLAME, compiled": ("flame", {"compile": "inductor"}),
        "FLAME, checkpointed": ("flame", {"grad_checkpointing": "always"}),
        "CLIP": ("clip", {}),
        "CLIP, compiled": ("clip", {"compile": "inductor"}),
    }
    if bench.device.type == "cpu":  # no C++ compiler is asked for
        ways = {name: way for name, way in ways.items() if "compile" not in way[1]}
    for name, (method, options) in ways.items():
        bench.add(name, **images_per_second(bench, run(method), steps=sizes.steps, **options))
    bench.add("open_clip's CLIP", **open_clip_step(bench))


def open_clip_step(bench: Bench) -> dict[str, Any]:
    """The same for open_clip's own model and loss, with its images in float32."""
    import open_clip

    sizes, device = bench.sizes, bench.device
    bench.peak_gb()
    layers, wide, patch = sizes.open_clip
    width, text_layers, heads = sizes.text
    model: Any = open_clip.CLIP(
        width,
        {"image_size": sizes.image_size, "layers": layers, "width": wide, "patch_size": patch},
        {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads}
        | {"layers": text_layers},
    )
    model = model.to(device).train()
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), fused=True)
    side = sizes.image_size
    images = torch.randn(sizes.batch, 3, side, side)
    texts = torch.randint(1, 49000, (sizes.batch, 77))
    if device.type == "cuda":
        images, texts = images.pin_memory(), texts.pin_memory()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            found = model(images.to(device, non_blocking=True), texts.to(device, non_blocking=True))
            loss = loss_of(*found)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # open_clip logs it

    rate = sizes.batch / bench.seconds(step, repeats=sizes.steps)
    return {"value": rate, "unit": "images/s", "batch": sizes.batch, "gb": bench.peak_gb()}


def memory(bench: Bench) -> None:
    """The paper's whole batch on one GPU, in micro-batches that the trainer chooses."""
    sizes = bench.sizes
    for name, backbone, options in (
        ("FLAME, micro-batches", sizes.backbone, {}),
        ("FLAME, micro-batches, compiled", sizes.backbone, {"compile": "inductor"}),
        ("FLAME, large backbone, micro-batches", sizes.large_backbone, {}),
    ):
        if "compile" in options and bench.device.type == "cpu":
            continue
        settings = settings_of(sizes, "flame", backbone, sizes.whole_batch, "auto")
        options = {"micro_batch": "auto" if bench.device.type == "cuda" else 8} | options
        bench.add(name, **images_per_second(bench, settings, steps=2, warm_up=1, **options))


def equality(bench: Bench) -> None:
    """Losses in float32 of the ways that should change none: micro-batches, checkpointing, NCCL."""
    from flame.training import processes

    sizes, steps = bench.sizes, 4

    def losses(method: str, place: Any = None, **options: Any) -> list[float]:
        settings = settings_of(sizes, method, sizes.backbone, sizes.small_batch, "float32")
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(bench, settings, Path(folder), place=place, **options)
            return [trainer.advance(trainer.batches[n])["loss"] for n in range(steps)]

    def compare(name: str, found: Sequence[float], wanted: Sequence[float]) -> None:
        gap = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        bench.add(name, gap, f"largest difference of {steps} losses", loss=wanted[-1])

    whole = {"micro_batch": sizes.small_batch, "grad_checkpointing": "never"}
    plain = {method: losses(method, **whole) for method in ("flame", "clip")}
    compare("FLAME, the same again", losses("flame", **whole), plain["flame"])
    for method, wanted in plain.items():
        ways = {
            "micro-batched": whole | {"micro_batch": sizes.small_batch // 4},
            "checkpointed": whole | {"grad_checkpointing": "always"},
        }
        for name, options in ways.items():
            compare(f"{method.upper()}, {name}", losses(method, **options), wanted)
    with one_process(), processes.joined(bench.device.type) as place:
        backend = torch.distributed.get_backend()
        compare(
            f"FLAME, one process of torchrun, {backend}",
            losses("flame", place, **whole),
            plain["flame"],
        )


@contextmanager
def one_process() -> Iterator[None]:
    """The environment that `torchrun` gives to a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    given |= {"MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in given.items()}
    yield
    for name in given:
        del os.environ[name]


def resume(bench: Bench) -> None:
    """Save after two steps, restore, and take two more, beside four steps at a stretch."""
    sizes = bench.sizes
    settings = settings_of(sizes, "flame", sizes.backbone, sizes.small_batch, "float32")

    def losses(folder: Path, steps: int) -> list[float]:
        trainer = trainer_of(bench, settings, folder, steps=4)
        batches = [trainer.batches[n] for n in range(trainer.step, steps)]
        trainer.run(batches)  # saves after every step
        return [
            json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()
        ]

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parted:
        wanted = losses(Path(whole), 4)
        losses(Path(parted), 2)
        found = losses(Path(parted), 4)
        size = (Path(parted) / "checkpoint.safetensors").stat().st_size / 1e9
    gap = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    bench.add("resumed after 2 of 4 steps", gap, "largest difference of the loss", gb_file=size)
