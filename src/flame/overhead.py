"""Embedding and training, timed against their alternatives -> seconds and ratios (Figure 5)."""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from flame.embedding.llm import FrozenLLM
from flame.evaluation.overhead import captions_of, embedding_ways, in_turn, ratios
from flame.evaluation.records import write_json
from flame.evaluation.steps import runs, training_ways
from flame.runtime import command
from flame.study.settings import OverheadSettings
from flame.training.speed import DEFAULT, Speed


def overhead(
    images: Path,
    llm: Path,
    stores: list[Path],
    out: Path,
    settings: OverheadSettings,
    threads: int = 1,
    workers: int = 0,
    speed: Speed = DEFAULT,
) -> None:
    """Time embedding and training; nothing else should run on the machine.

    Args:
        images: folder of the data set, with its captions.
        llm: folder of the frozen LLM.
        stores: embedding stores of the FLAME run, every part of every kind.
        out: JSON file to write: seconds per caption or step, one value per round, and their ratios.
        settings: what is timed.
        threads: CPU threads.
        workers: processes that read batches before the steps on them are timed.
        speed: micro-batches, gradient checkpointing and compilation of all trainings.
    """
    torch.set_num_threads(threads)
    embedding, chosen = settings.embedding, settings.overhead
    encoder = FrozenLLM(llm, embedding)
    captions = captions_of(images, embedding)["text"].head(chosen.captions).to_list()
    with TemporaryDirectory() as aside:
        ways = embedding_ways(encoder, captions, embedding)
        ways |= training_ways(
            runs(images, stores, encoder, settings),
            images,
            encoder,
            Path(aside),
            speed=speed,
            workers=workers,
        )
        seconds = in_turn(ways, chosen.rounds)
    place = torch.cuda.get_device_name() if encoder.device.type == "cuda" else "CPU"
    cores = "1 thread" if threads == 1 else f"{threads} threads"
    packages = ("torch", "transformers", "timm", "open_clip_torch")
    result = {
        "settings": settings.model_dump(mode="json"),
        "seconds": seconds,
        "ratios": ratios(seconds),
        "captions": len(captions),
        "steps": {name: ways[name].units for name in ("flame", "clip", "online")},
        "device": f"{place}, {cores}, LLM in {str(encoder.dtype).split('.')[1]}",
        "versions": {package: version(package) for package in packages},
    }
    write_json(out, result)


if __name__ == "__main__":
    command.main(overhead)
