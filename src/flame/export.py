"""A trained tower and its LLM -> one folder that `flame.load` opens, with a model card; the hub."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from flame.evaluation.encoder import RECORD
from flame.report.markdown import markdown_table, metric_name
from flame.runtime import command
from flame.runtime.checksums import read_json, seal, sha256, verified, verify
from flame.runtime.resumable import resumable, write_atomic
from flame.study.schema.llms import HubCheckpoint
from flame.study.settings import ExportSettings

PAPER = "https://arxiv.org/abs/2411.11927"


def write(
    model: Path, llm: Path, out: Path, settings: ExportSettings, *, metrics: tuple[Path, ...] = ()
) -> None:
    """Write the folder of an export.

    An LLM of the hub is named in it; one from anywhere else is copied into it.

    Args:
        model: folder of the trained tower.
        llm: folder of its LLM.
        out: folder to write.
        settings: how texts are read.
        metrics: results of evaluations, for the model card.
    """
    origin = settings.model_dump(mode="json") | {
        "tower": sha256(model / "model.safetensors"),
        "llm": sha256(llm / "flame.json"),
    }
    verify(llm)
    record = read_json(model / "run.json")
    described = read_json(llm / "flame.json")
    results = [read_json(path) for path in metrics]
    with resumable(out, origin) as folder:
        for name in ("model.safetensors", "run.json"):
            shutil.copyfile(verified(model / name), folder / name)
        if not isinstance(settings.checkpoint, HubCheckpoint) or settings.reset is not None:
            shutil.copytree(llm, folder / "llm", dirs_exist_ok=True)
        card = _card(settings, record, described, [r for each in results for r in each["records"]])
        write_atomic(folder / "README.md", card.encode())
        write_atomic(folder / RECORD, settings.model_dump_json(indent=1).encode())
        seal(folder, ["model.safetensors", "run.json", RECORD])  # the card may be written on


def push(folder: Path, repo: str, *, private: bool = True) -> None:
    """Put an export on the hub; HF_ENDPOINT and HF_TOKEN are honoured.

    Args:
        folder: as `write` made it.
        repo: `owner/name`; made if it is not there.
        private: whether only its owner sees it, where it is made.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} is no export of FLAME: it has no {RECORD}")
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained FLAME")


def _card(
    settings: ExportSettings,
    record: dict[str, Any],
    llm: dict[str, Any],
    records: list[dict[str, Any]],
) -> str:
    """The model card: what it is, how to use it, what it was trained on, what it reached."""
    trained = record["settings"]
    recipe, backbone = trained["recipe"], trained["backbone"]
    kinds = "\n".join(
        f"- `{kind}`: {', '.join(reading.facets)}" for kind, reading in settings.kinds.items()
    )
    rows = [
        [
            r["benchmark"],
            metric_name(name),
            f"{m['value']:.1f}",
            f"{m['low']:.1f} to {m['high']:.1f}",
        ]
        for r in records
        for name, m in r["metrics"].items()
    ]
    head = ["benchmark", "metric", "%", "95 % interval"]
    table = markdown_table([head, ["---", "---", "---:", "---:"], *rows]) if rows else "None.\n"
    return f"""---
library_name: flame
pipeline_tag: zero-shot-image-classification
license: other
license_name: of-its-parts
tags: [flame, clip, zero-shot-image-classification, image-text-retrieval]
---

# {settings.run}

An image tower trained to match what a frozen LLM says of captions, by the method of
[FLAME]({PAPER}), in an independent reproduction. These are not the paper's own weights.

```python
import flame

model = flame.load("this folder, or owner/name")
images, texts = model.encode_image([image]), model.encode_text(["a photo of a dog."])
print(images @ texts.T)
```

`encode_text(texts, kind)` reads texts with one of these prompts, the mean of whose facets it gives:

{kinds}

## Parts

- Image tower: timm's `{backbone["timm"]}`, {backbone["image_size"]} pixels, trained from scratch
  for {recipe["epochs"]} epochs on data set `{trained["dataset"]}`, batches of
  {recipe["batch_size"]}, seed {trained["seed"]}. All settings: `run.json`.
- LLM: {llm["origin"]}, licence: {llm["licence"] or "as its publisher states it"}; not trained.

## Results

Zero-shot, in percent, on the benchmarks of the study that it was trained in; where that is the
demo study, they are stand-ins drawn by a program, and say nothing of photographs.

{table}"""


if __name__ == "__main__":
    command.main({"write": write, "push": push})
