"""Contrastive losses between images and the texts of their captions.

Shapes: B images of this process, A images of all processes, K facets, D width. With one process
A = B. With several, each process computes the loss of its own images; the mean over processes,
which `DistributedDataParallel` takes of the gradients, is the loss of the whole batch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flame.study.schema.runs import Recipe
from flame.study.settings import LongClipTraining, Training
from flame.towers.base import Outputs
from flame.training.processes import gather, rank

# (images, texts, scale, bias, weights) -> loss
Criterion = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def softmax_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric softmax loss of each facet against the same facet of the batch (Eq. 1).

    L = (L_I + L_T) / 2, where L_I classifies the texts of prompt k for a given image and L_T the
    images for a given text of prompt k. The paper's sums over N and K are means here: AdamW
    ignores the scale of a loss, and losses and gradient norms stay comparable between runs with 1
    and with 9 prompts.

    Args:
        images: (B, D) image features, of any norm.
        texts: (B, K, D) facet embeddings, of any norm.
        scale: () 1/tau.
        bias: () unused: a softmax is invariant to it.
        weights: (K,) weight of each facet, summing to 1; None: 1 / K each.
        label_smoothing: share of the target probability that is spread evenly over all A.
    """
    images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
    all_images, all_texts = gather(images), gather(texts)
    first = len(images) * rank()
    labels = torch.arange(first, first + len(images), device=images.device)

    def facet_loss(images: Tensor, all_images: Tensor, scale: Tensor, k: int) -> Tensor:
        image_logits = scale * images @ all_texts[:, k].T
        # With one process both logits are the same matrix: do not compute it twice.
        own = all_images is images
        text_logits = image_logits.T if own else scale * texts[:, k] @ all_images.T
        return (
            functional.cross_entropy(image_logits, labels, label_smoothing=label_smoothing)
            + functional.cross_entropy(text_logits, labels, label_smoothing=label_smoothing)
        ) / 2

    return _mean_of_facets(facet_loss, texts.shape[1], weights, images, all_images, scale)


def sigmoid_loss(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Multi-positive sigmoid loss of the official release: K of the K A texts match an image.

    Each pair of an image and a text is classified by itself (SigLIP); the sum over all pairs is
    divided by the number of texts.

    Args:
        images: (B, D) image features, of any norm.
        texts: (B, K, D) facet embeddings, of any norm.
        scale: () 1/tau.
        bias: () added to every logit.
        weights: (K,) weight of each facet, summing to 1; None: 1 / K each.
    """
    images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
    all_texts = gather(texts)
    signs = -torch.ones(len(images), len(all_texts), device=images.device)
    signs.diagonal(len(images) * rank()).fill_(1.0)

    def facet_loss(images: Tensor, scale: Tensor, bias: Tensor, k: int) -> Tensor:
        logits = scale * images @ all_texts[:, k].T + bias
        return -functional.logsigmoid(signs * logits).sum() / len(images)

    return _mean_of_facets(facet_loss, texts.shape[1], weights, images, scale, bias)


LOSSES: dict[str, Criterion] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def criterion(recipe: Recipe) -> Criterion:
    """Contrastive loss of a recipe.

    Raises:
        ValueError: the recipe smooths labels, and its loss has none.
    """
    if not recipe.label_smoothing:
        return LOSSES[recipe.loss]
    if recipe.loss != "softmax":
        raise ValueError(
            f"label_smoothing {recipe.label_smoothing} with loss {recipe.loss!r}; "
            "known for it: 'softmax'"
        )
    return partial(softmax_loss, label_smoothing=recipe.label_smoothing)


def kind_weights(kinds: Sequence[str]) -> Tensor:
    """Weights of facets with which every caption kind contributes the same to the loss.

    In the sum over k of Eq. 1 a kind counts as often as it has facets: with seven long prompts, one
    short and one raw, the long ones make up 7/9 of the loss. With these weights, each of the three
    kinds makes up 1/3.

    Args:
        kinds: caption kind of each of the K facets of a step.

    Returns:
        (K,) float32: 1 / (kinds that occur x facets of the same kind), summing to 1.
    """
    facets = Counter(kinds)
    return torch.tensor([1 / (len(facets) * facets[kind]) for kind in kinds])


def step_loss(settings: Training, facets: Sequence[tuple[str, str]]) -> "StepLoss":
    """The loss of a run's training steps.

    Args:
        settings: the run.
        facets: (caption kind, facet) of each target facet.
    """
    if isinstance(settings, LongClipTraining):
        return LongClipLoss(settings, facets)
    return StepLoss(settings.recipe, facets)


class StepLoss:
    """Loss of a training step, computed in float32 from the outputs of a tower."""

    def __init__(self, recipe: Recipe, facets: Sequence[tuple[str, str]]) -> None:
        """Choose the criterion and the weights of the facets.

        Args:
            recipe: of the run.
            facets: (caption kind, facet) of each target facet.
        """
        self._criterion = criterion(recipe)
        self._by_kind = recipe.weigh == "kinds"
        self._kinds = [kind for kind, _ in facets]

    def __call__(self, outputs: Outputs, columns: Tensor) -> Tensor:
        """Loss () of a step.

        Args:
            outputs: of the tower's `forward`.
            columns: (K,) the indices of target facets that `forward` got.
        """
        weights = None
        if self._by_kind:
            kinds = [self._kinds[column] for column in columns.tolist()]
            weights = kind_weights(kinds).to(outputs.scale.device, non_blocking=True)
        images, texts = outputs.images.float(), outputs.texts.float()
        return self._criterion(images, texts, outputs.scale, outputs.bias, weights)


class LongClipLoss(StepLoss):
    """Sum of the losses of the long and of the short captions.

    Short captions are matched with the principal components of the image features only (Long-CLIP,
    ECCV 2024, and its release).
    """

    def __init__(self, settings: LongClipTraining, facets: Sequence[tuple[str, str]]) -> None:
        super().__init__(settings.recipe, facets)
        self._short, self._components = settings.short, settings.components

    def __call__(self, outputs: Outputs, columns: Tensor) -> Tensor:
        """Loss () of a step; see `StepLoss`."""
        images = functional.normalize(outputs.images.float(), dim=-1)
        losses = []
        for k, column in enumerate(columns.tolist()):
            short = self._kinds[column] == self._short
            matched = _coarse(images, self._components) if short else images
            texts = outputs.texts[:, k : k + 1].float()
            losses.append(self._criterion(matched, texts, outputs.scale, outputs.bias, None))
        return torch.stack(losses).sum()


def principal(features: Tensor, components: int) -> Tensor:
    """Features reduced to their mean and their first principal components.

    The gradient is that of a projection onto axes which depend on the features. It is written out
    because the gradient of an SVD divides by the gap between any two singular values, even where
    both are 0. This one divides only by gaps between an axis that is kept and one that is dropped.

    Args:
        features: (A, D).
        components: number of axes to keep.

    Returns:
        (A, D).
    """
    if components >= min(len(features) - 1, features.shape[1]):
        return features
    mean = features.mean(dim=0)
    centered = features - mean
    with torch.no_grad():
        wide = centered.double()
        variances, axes = torch.linalg.eigh(wide.T @ wide)  # ascending
        gaps = variances[-components:, None] - variances[None, :-components]
        gaps = gaps.clamp(min=1e-6 * variances[-1]).to(features)
        kept, dropped = axes[:, -components:].to(features), axes[:, :-components].to(features)
    inside, outside = centered @ kept, centered @ dropped  # (A, components), (A, D - components)
    # First-order perturbation: how far each kept axis turns towards each dropped one. The value is
    # 0, the gradient is not.
    turn = inside.T @ outside / gaps
    turn = turn - turn.detach()
    return mean + inside @ (kept.T + turn @ dropped.T) + outside @ turn.T @ kept.T


def _coarse(images: Tensor, components: int) -> Tensor:
    """This process's image features (B, D), reduced to the principal components of all (A, D)."""
    reduced = principal(gather(images), components)
    first = len(images) * rank()
    return reduced[first : first + len(images)]


def _mean_of_facets(
    facet_loss: Callable[..., Tensor], facets: int, weights: Tensor | None, *inputs: Tensor
) -> Tensor:
    # With several processes the (B, A) matrices are wide: recomputing them in the backward pass
    # takes the memory of one facet only. A single process keeps them, which is faster.
    if dist.is_initialized():
        losses = [checkpoint(facet_loss, *inputs, k, use_reentrant=False) for k in range(facets)]
    else:
        losses = [facet_loss(*inputs, k) for k in range(facets)]
    return torch.stack(losses).mean() if weights is None else torch.stack(losses) @ weights
