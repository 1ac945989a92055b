"""Create, save and load the towers of all methods."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from flame.runtime.checksums import read_json, seal, verified
from flame.study.settings import (
    AnyTower,
    ClipTraining,
    FlameTraining,
    PretrainedTower,
    Training,
)
from flame.towers.base import Tower
from flame.towers.flame import FlameTower


def create(settings: Training, dim: int | None = None) -> Tower:
    """Untrained tower of a run.

    Args:
        settings: the run.
        dim: width of the text embeddings; required by FLAME, whose settings do not hold it.
    """
    if isinstance(settings, FlameTraining):
        assert dim is not None
        return FlameTower(settings.backbone, settings.recipe, dim)
    # Imported here because open_clip takes seconds to import.
    if isinstance(settings, ClipTraining):
        from flame.towers.clip import ClipTower

        return ClipTower(settings.backbone, settings.recipe, settings.text_tower)
    from flame.towers.long_clip import LongClipTower

    return LongClipTower(settings)


def save(tower: Tower, folder: Path, record: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `run.json`, all that `load` needs.

    Args:
        tower: the trained tower.
        folder: an existing folder.
        record: content of `run.json`; must hold `settings` (a `Training`) and `dim`.
    """
    tensors = {name: value.contiguous() for name, value in tower.state_dict().items()}
    for kind, facets in tower.centers.items():
        tensors |= {f"centers/{kind}/{facet}": vector for facet, vector in facets.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    seal(folder, ["model.safetensors", "run.json"])


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A tower in evaluation mode, trained here or pretrained elsewhere, and its `run.json`.

    Raises:
        ValueError: a file is corrupt.
    """
    record = read_json(verified(folder / "run.json"))
    settings = TypeAdapter[AnyTower](AnyTower).validate_python(record["settings"])
    if isinstance(settings, PretrainedTower):
        # Imported here because its libraries take seconds to import.
        from flame.towers import pretrained

        return pretrained.load(folder, settings), record
    tower = create(settings, record["dim"])
    tensors = load_file(verified(folder / "model.safetensors"))
    for name in [name for name in tensors if name.startswith("centers/")]:
        _, kind, facet = name.split("/", 2)
        tower.centers.setdefault(kind, {})[facet] = tensors.pop(name)
    tower.load_state_dict(tensors)
    return tower.eval(), record
