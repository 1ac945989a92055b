"""Embedding and training, timed against their alternatives -> seconds and ratios (Figure 5)."""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from flame.embedding.llm import FrozenLLM
from flame.evaluation.overhead import embedding_ways, in_turn, ratios, runs, texts_of, training_way
from flame.evaluation.records import write_json
from flame.runtime import command
from flame.study.settings import OverheadSettings


def overhead(
    images: Path,
    llm: Path,
    stores: list[Path],
    out: Path,
    settings: OverheadSettings,
    threads: int = 1,
) -> None:
    """Time embedding and training; nothing else should run on the machine.

    Args:
        images: folder of the data set, with its captions.
        llm: folder of the frozen LLM.
        stores: embedding stores of the FLAME run, every part of every kind.
        out: JSON file to write: seconds per caption or step, one value per round, and their ratios.
        settings: what is timed.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    embedding, chosen = settings.embedding, settings.overhead
    encoder = FrozenLLM(llm, embedding)
    captions = texts_of(images, embedding)[1][: chosen.captions]
    with TemporaryDirectory() as aside:
        ways = embedding_ways(encoder, captions, embedding)
        ways |= {
            name: training_way(run, images, encoder, Path(aside) / name)
            for name, run in runs(images, stores, encoder, settings).items()
        }
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
