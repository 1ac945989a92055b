"""What every section of bench/gpu.py runs with: sizes, clock, and where results go."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

PEAK = 989e12  # FLOP/s of an H100 in bfloat16, dense: what MFU is relative to


class Sizes(NamedTuple):
    """What is run; those of the paper unless `--quick`."""

    matmul: int = 8192
    copy: int = 1 << 30  # bytes
    layers: int = 40
    width: int = 5120
    hidden: int = 14336
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    tokens_of_llm: int = 131072
    captions: int = 2048  # of four shards
    tokens_timed: int = 130_000
    long_tokens: int = 153  # of a caption with its template, on average
    suffix_tokens: int = 15  # of each facet
    facets: int = 9
    budgets: tuple[int, ...] = (8192, 16384, 32768, 65536)
    backbone: str = "vit_base_patch16_clip_224"
    large_backbone: str = "vit_large_patch14_clip_224"
    open_clip: tuple[int, int, int] = (12, 768, 16)  # layers, width, patch of its ViT-B/16
    image_size: int = 224
    targets: int = 11  # flame-7: seven long prompts, three short ones, the raw caption
    batch: int = 512
    whole_batch: int = 4096
    small_batch: int = 64
    text: tuple[int, int, int] = (512, 12, 8)  # width, layers, heads of CLIP's text tower
    steps: int = 8
    images: int = 4096
    photo: tuple[int, int] = (512, 683)
    workers: tuple[int, ...] = (1, 4, 8, 16)
    vision: str = "vit_so400m_patch14_siglip_gap_448"
    slices: int = 64
    mllm: tuple[int, int, int, int, int] = (
        32,
        4096,
        14336,
        32,
        8,
    )  # layers, width, hidden, heads, key heads
    vocabulary: int = 128256
    sequences: int = 256
    prompt_tokens: int = 350
    caption_tokens: int = 150


QUICK = Sizes(
    matmul=256,
    copy=1 << 20,
    layers=2,
    width=64,
    hidden=96,
    heads=4,
    key_heads=2,
    head_dim=16,
    tokens_of_llm=200,
    captions=12,
    tokens_timed=1000,
    long_tokens=20,
    suffix_tokens=4,
    facets=3,
    budgets=(256,),
    backbone="test_vit",
    large_backbone="test_vit",
    open_clip=(1, 64, 16),
    image_size=32,
    targets=3,
    batch=16,
    whole_batch=32,
    small_batch=8,
    text=(32, 1, 2),
    steps=2,
    images=64,
    photo=(64, 85),
    workers=(1, 2),
    vision="test_vit",
    slices=2,
    mllm=(2, 64, 96, 4, 2),
    vocabulary=300,
    sequences=8,
    prompt_tokens=20,
    caption_tokens=8,
)


class Bench:
    """What a section runs with, and where its results go."""

    def __init__(self, section: str, device: str, quick: bool, out: Path) -> None:
        self.section, self.quick = section, quick
        self.device = torch.device(device)
        self.sizes = QUICK if quick else Sizes()
        self._out = out

    def add(self, what: str, value: float, unit: str, **more: Any) -> None:
        """Append a result to the file, and print it."""
        line = {"section": self.section, "what": what, "value": value, "unit": unit} | more
        with self._out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(row(line), flush=True)

    def sync(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 3, *, warm: bool = False) -> float:
        """Median seconds of a function, after a warm-up unless it is warm."""
        if not warm:
            run()
        each = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            each.append(time.perf_counter() - start)
        return median(each)

    def peak_gb(self) -> float:
        """Most GPU memory allocated since the last call, in GB."""
        if self.device.type != "cuda":
            return 0.0
        found = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return round(found, 1)


def row(line: dict[str, Any]) -> str:
    """A result as a line of the table."""
    value = line["value"]
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    more = ", ".join(
        f"{name} {given:.3g}" if isinstance(given, float) else f"{name} {given}"
        for name, given in line.items()
        if name not in ("section", "what", "value", "unit")
    )
    return f"{line['section']:10}{line['what']:45}{number:>10} {line['unit']}  {more}".rstrip()
