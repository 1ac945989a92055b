"""A checkpoint of the official release, an open_clip state dict, as a `FlameTower`."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from flame.study.settings import ReleasedTower
from flame.towers.flame import FlameTower

# Parts of the release's model that its image features do not use: the frozen LLM, the final norm
# and the projection of open_clip's own ViT (benchmarks.md, section 9, 17 and 19).
UNUSED = ("text.", "visual.ln_post.", "visual.proj")


def convert(file: Path, settings: ReleasedTower) -> tuple[FlameTower, dict[str, Any]]:
    """The tower in a released checkpoint, and the record of its run: what `save` takes.

    Args:
        file: state dict, as `.pt` written by open_clip's training or as `.safetensors`.
        settings: how it was trained, and where it comes from.

    Raises:
        ValueError: the file holds more than tensors, or tensors that do not fit, which are named.
    """
    tensors = _state_dict(file)
    width = next((tensors[name] for name in ("mm.2.bias", "mm.3.bias") if name in tensors), None)
    if width is None:
        raise ValueError(f"{file.name} has no projector 'mm.*': it is not a checkpoint of FLAME")
    tower = FlameTower(settings.training.backbone, settings.training.recipe, len(width))
    weights = _renamed(tensors, tower)
    wanted = tower.state_dict()
    for name in ("mean", "std"):
        weights[name] = wanted[name]
    _refuse_unlike(file.name, weights, wanted)
    tower.load_state_dict(weights)
    weights_of = settings.weights
    record = {
        "settings": settings.training.model_dump(mode="json"),
        "dim": tower.dim,
        "origin": f"hub:{weights_of.id}@{weights_of.revision}/{weights_of.file}",
    }
    return tower, record


def _state_dict(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        found: Any = load_file(file)
    else:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file.name} holds more than tensors and was not unpickled: it could run code"
            ) from error
    found = found.get("state_dict", found)
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def _renamed(tensors: dict[str, Tensor], tower: FlameTower) -> dict[str, Tensor]:
    """Tensors renamed to fit our tower; timm's own converter renames those of the ViT."""
    used = {name: value for name, value in tensors.items() if not name.startswith(UNUSED)}
    visual = {name: value for name, value in used.items() if name.startswith("visual.")}
    _refuse_resampling(visual, tower)
    weights = {
        f"visual.{name}": value
        for name, value in checkpoint_filter_fn(visual, tower.visual).items()
    }
    for name, value in used.items():
        match name.split("."):
            case ["visual", *_]:
                continue
            case ["mm", *rest]:
                weights[".".join(["projector", *rest])] = value
            case ["logit_scale"]:
                weights["log_scale"] = value.reshape(())
            case ["logit_bias"]:
                weights["bias"] = value.reshape(())
            case _:
                weights[name] = value
    return weights


def _refuse_resampling(visual: dict[str, Tensor], tower: FlameTower) -> None:
    """Refuse patches and positions of another size, which timm's converter silently resamples."""
    for name, own in {
        "visual.conv1.weight": tower.visual.patch_embed.proj.weight.shape,
        "visual.positional_embedding": tower.visual.pos_embed.shape[1:],
    }.items():
        if name in visual and visual[name].shape != own:
            shape = tuple(visual[name].shape)
            raise ValueError(f"{name} is {shape}, the study's backbone has {tuple(own)}")


def _refuse_unlike(file: str, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    unlike = {
        "lacks": sorted(wanted.keys() - given.keys()),
        "has besides": sorted(given.keys() - wanted.keys()),
        "has in another shape": sorted(
            f"{name} {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in wanted.keys() & given.keys()
            if given[name].shape != wanted[name].shape
        ),
    }
    lines = [f"{what} {', '.join(names[:5])}" for what, names in unlike.items() if names]
    if lines:
        raise ValueError(
            f"{file} does not fit the study's backbone and recipe: it " + "; ".join(lines)
        )
