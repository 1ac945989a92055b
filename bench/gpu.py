"""The paper's shapes with random weights on one GPU: ceilings, exactness, speed and memory.

    python bench/gpu.py                              # on an H100, within ten minutes
    python bench/gpu.py --sections embed train       # some sections
    python bench/gpu.py --device cpu --quick         # all of it at toy size, under a minute

It needs no network, no weights and no data; docs/gpu.md lists the packages. Each section runs in a
process of its own, within its own time limit, and appends its results to a JSON Lines file as they
come. A table of them is printed at the end; bench/README.md explains it.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_bench import Bench, row
from gpu_captions import captions
from gpu_images import evaluate, loader
from gpu_llm import ceilings, embed, exact
from gpu_training import equality, memory, resume, train

PACKAGES = ("torch", "transformers", "timm", "open_clip_torch")

# Section -> its time limit in seconds.
SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "ceilings": (ceilings, 60),
    "exact": (exact, 90),
    "embed": (embed, 150),
    "train": (train, 150),
    "memory": (memory, 120),
    "equality": (equality, 90),
    "resume": (resume, 60),
    "loader": (loader, 90),
    "evaluate": (evaluate, 60),
    "captions": (captions, 90),
}


def work(section: str, device: str, quick: bool, out: Path) -> None:
    """Run a section in a process of its own."""
    if device == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    SECTIONS[section][0](Bench(section, device, quick, out))


def run(section: str, device: str, quick: bool, out: Path) -> str | None:
    """Run a section within its time limit; what went wrong, if anything did."""
    limit = SECTIONS[section][1] * (3 if quick else 1)  # a CPU may be busy
    # Forked from a server that has imported the libraries: importing them takes seconds.
    process = multiprocessing.get_context("forkserver").Process(
        target=work, args=(section, device, quick, out)
    )
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"stopped after {limit} s"
    return f"exit code {process.exitcode}" if process.exitcode else None


def machine(device: str, quick: bool) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": name,
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "quick": quick,
        "python": sys.version.split()[0],
        "versions": {package: version(package) for package in PACKAGES},
    }


def main() -> int:
    """Run the sections one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.jsonl"), help="JSON Lines to append to"
    )
    args = parser.parse_args()
    multiprocessing.set_forkserver_preload(["torch", "timm", "transformers", "open_clip"])
    about = machine(args.device, args.quick)
    with args.out.open("a") as file:
        file.write(json.dumps({"machine": about}) + "\n")
    print(about)
    failed = {}
    for section in args.sections:
        start = time.monotonic()
        wrong = run(section, args.device, args.quick, args.out)
        if wrong:
            failed[section] = wrong
        print(f"{section}: {wrong or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
    print()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()]
    last = max(n for n, line in enumerate(lines) if "machine" in line)
    for line in lines[last + 1 :]:
        print(row(line))
    for section, wrong in failed.items():
        print(f"{section:10}FAILED: {wrong}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
