"""AdamW with the settings of a recipe, its learning rate, and its state as plain tensors."""

import math
from collections.abc import Mapping

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flame.study.schema.runs import Recipe


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero.

    Args:
        step: number of the step, from 0.
        steps: total number of steps.
        recipe: peak learning rate and length of the warm-up.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / (steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * share))


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Optimizer of all trainable parameters. Vectors and scalars do not decay, as in open_clip."""
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Moving average of the weights and of the statistics of BatchNorm, if the recipe wants one.

    Call its `update_parameters` after every step.
    """
    if recipe.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, averaged: AveragedModel | None = None
) -> dict[str, Tensor]:
    """All tensors of a checkpoint.

    Their names are `model/<name>`, `average/<name>` and `optimizer/<key>/<parameter>`.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if averaged is not None:
        tensors |= {f"average/{name}": value for name, value in averaged.state_dict().items()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def load_state_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    averaged: AveragedModel | None = None,
) -> None:
    """Restore the tensors of `state_tensors`."""
    params = dict(model.named_parameters())
    weights: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    for name, value in tensors.items():
        section, rest = name.split("/", 1)
        if section in weights:
            weights[section][rest] = value
            continue
        key, param_name = rest.split("/", 1)
        param = params[param_name]
        # The fused kernel expects the memory format of the parameter.
        like = param.detach() if value.shape == param.shape else value
        optimizer.state[param][key] = torch.empty_like(like).copy_(value)
    model.load_state_dict(weights["model"])
    if averaged is not None:
        averaged.load_state_dict(weights["average"])
