"""AdamW as the recipe wants it, its learning rate, and its state as plain tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flame.study.schema.runs import Recipe


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero.

    Args:
        step: number of the step, from 0.
        steps: number of all steps.
        recipe: has the peak and the length of the warm-up.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / (steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * share))


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Optimizer of all trainable parameters; only matrices and filters decay, as in open_clip."""
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {
            "params": [p for p in params if p.ndim >= 2],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training, named `model/<name>` and `optimizer/<key>/<parameter>`."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put the tensors of `state_tensors` back."""
    params = dict(model.named_parameters())
    weights = {}
    for name, value in tensors.items():
        section, rest = name.split("/", 1)
        if section == "model":
            weights[rest] = value
            continue
        key, param_name = rest.split("/", 1)
        param = params[param_name]
        # In the parameter's own memory format: the fused kernel walks both side by side.
        like = param.detach() if value.shape == param.shape else value
        optimizer.state[param][key] = torch.empty_like(like).copy_(value)
    model.load_state_dict(weights)
