"""Contrastive losses between images and the facet embeddings of their captions.

Shapes: B images of this process, A images of all processes, K facets, D width. With one process
A = B; with many, each process computes its own share and the mean over processes, which
`DistributedDataParallel` takes of the gradients, is the loss of the whole batch.
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
from flame.training.processes import gather, rank

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


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
    ignores the scale of a loss, and so the losses and gradient norms of runs with 1 and with 9
    prompts can be compared.

    Args:
        images: (B, D) image features, of any norm.
        texts: (B, K, D) facet embeddings, of any norm.
        scale: () 1/tau.
        bias: () not used: a softmax does not see it.
        weights: (K,) share of each facet, summing to 1; None: that of the plain sum, 1 / K.
        label_smoothing: share of the target probability that is spread evenly over all A.
    """
    images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
    all_images, all_texts = gather(images), gather(texts)
    first = len(images) * rank()
    labels = torch.arange(first, first + len(images), device=images.device)

    def facet_loss(images: Tensor, all_images: Tensor, scale: Tensor, k: int) -> Tensor:
        image_logits = scale * images @ all_texts[:, k].T
        # With one process both are one matrix, and its product need not be computed twice.
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
    """Multi-positive sigmoid loss of the official release: K of the K A texts are an image's own.

    Each pair of an image and a text is a question of its own (SigLIP); the sum over all pairs is
    divided by the number of texts.

    Args:
        images: (B, D) image features, of any norm.
        texts: (B, K, D) facet embeddings, of any norm.
        scale: () 1/tau.
        bias: () added to every logit.
        weights: (K,) share of each facet, summing to 1; None: that of the plain sum, 1 / K.
    """
    images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
    all_texts = gather(texts)
    signs = -torch.ones(len(images), len(all_texts), device=images.device)
    signs.diagonal(len(images) * rank()).fill_(1.0)

    def facet_loss(images: Tensor, scale: Tensor, bias: Tensor, k: int) -> Tensor:
        logits = scale * images @ all_texts[:, k].T + bias
        return -functional.logsigmoid(signs * logits).sum() / len(images)

    return _mean_of_facets(facet_loss, texts.shape[1], weights, images, scale, bias)


LOSSES: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def criterion(recipe: Recipe) -> Loss:
    """The loss of a recipe.

    Raises:
        ValueError: label smoothing where the loss has no labels to smooth.
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
    """Shares of facets in a loss to which every caption kind contributes the same.

    The sum over k of Eq. 1 lets a kind count as often as it has facets: with seven long prompts,
    one for short and one for raw captions, the long ones are 7/9 of the loss. Here each of the
    three kinds is 1/3 of it.

    Args:
        kinds: caption kind of each of the K facets of a step.

    Returns:
        (K,) float32: 1 / (kinds that occur x facets of the same kind), summing to 1.
    """
    facets = Counter(kinds)
    return torch.tensor([1 / (len(facets) * facets[kind]) for kind in kinds])


def _mean_of_facets(
    facet_loss: Callable[..., Tensor], facets: int, weights: Tensor | None, *inputs: Tensor
) -> Tensor:
    # Many processes make the (B, A) matrices wide: computing those of a facet again for the
    # gradient needs memory for one facet only. One process keeps them, which is faster.
    if dist.is_initialized():
        losses = [checkpoint(facet_loss, *inputs, k, use_reentrant=False) for k in range(facets)]
    else:
        losses = [facet_loss(*inputs, k) for k in range(facets)]
    return torch.stack(losses).mean() if weights is None else torch.stack(losses) @ weights
