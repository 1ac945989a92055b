"""A trained tower and its LLM -> one folder that `flame.load` opens, with a model card; the hub."""

import shutil
from pathlib import Path

from flame.data import hub
from flame.evaluation.encoder import RECORD
from flame.report.model_card import model_card
from flame.runtime import command
from flame.runtime.checksums import read_json, seal, sha256, verified, verify
from flame.runtime.resumable import resumable, write_atomic
from flame.study.schema.llms import HubCheckpoint
from flame.study.settings import ExportSettings


def write(
    model: Path, llm: Path, out: Path, settings: ExportSettings, *, metrics: tuple[Path, ...] = ()
) -> None:
    """Write the folder of an export.

    An LLM on the hub is referred to by id and commit; any other is copied into the folder.

    Args:
        model: folder of the trained tower.
        llm: folder of its LLM.
        out: folder to write.
        settings: LLM, prompts and facets for each kind of text.
        metrics: JSON files of evaluations, for the model card.
    """
    origin = settings.model_dump(mode="json") | {
        "tower": sha256(model / "model.safetensors"),
        "llm": sha256(llm / "flame.json"),
    }
    verify(llm)
    training = read_json(model / "run.json")["settings"]
    described = read_json(llm / "flame.json")
    records = [record for path in metrics for record in read_json(path)["records"]]
    with resumable(out, origin) as folder:
        for name in ("model.safetensors", "run.json"):
            shutil.copyfile(verified(model / name), folder / name)
        if not isinstance(settings.checkpoint, HubCheckpoint) or settings.reset is not None:
            shutil.copytree(llm, folder / "llm", dirs_exist_ok=True)
        card = model_card(settings, training, described, records)
        write_atomic(folder / "README.md", str(card).encode())
        write_atomic(folder / RECORD, settings.model_dump_json(indent=1).encode())
        seal(folder, ["model.safetensors", "run.json", RECORD])  # the card may be edited


def push(folder: Path, repo: str, *, private: bool = True) -> None:
    """Upload an export to the hub; HF_ENDPOINT and HF_TOKEN are honoured.

    Args:
        folder: as written by `write`.
        repo: `owner/name`; created if it does not exist.
        private: whether a repository that is created is private.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} is not an export of FLAME: it has no {RECORD}")
    hub.upload(folder, repo, private=private, message="Trained FLAME")


if __name__ == "__main__":
    command.main({"write": write, "push": push})
