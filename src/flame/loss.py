"""Contrastive losses between images and the facet embeddings of their captions.

Shapes: B images of this process, A images of all processes, K facets, D width. With one process
A = B; with many, each process computes its own share and the mean over processes, which
`DistributedDataParallel` takes of the gradients, is the loss of the whole batch.
"""

from collections.abc import Callable

import torch
import torch.distributed.nn.functional as collectives
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def softmax_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
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
    """
    images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
    all_images, all_texts = _gather_with_gradient(images), _gather(texts)
    first = len(images) * _rank()
    labels = torch.arange(first, first + len(images), device=images.device)

    def facet_loss(images: Tensor, all_images: Tensor, scale: Tensor, k: int) -> Tensor:
        image_logits = scale * images @ all_texts[:, k].T
        # With one process both are one matrix, and its product need not be computed twice.
        own = all_images is images
        text_logits = image_logits.T if own else scale * texts[:, k] @ all_images.T
        return (
            functional.cross_entropy(image_logits, labels)
            + functional.cross_entropy(text_logits, labels)
        ) / 2

    return _mean_of_facets(facet_loss, texts.shape[1], images, all_images, scale)


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Multi-positive sigmoid loss of the official release: K of the K A texts are an image's own.

    Each pair of an image and a text is a question of its own (SigLIP); the sum over all pairs is
    divided by the number of texts.

    Args:
        images: (B, D) image features, of any norm.
        texts: (B, K, D) facet embeddings, of any norm.
        scale: () 1/tau.
        bias: () added to every logit.
    """
    images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
    all_texts = _gather(texts)
    signs = -torch.ones(len(images), len(all_texts), device=images.device)
    signs.diagonal(len(images) * _rank()).fill_(1.0)

    def facet_loss(images: Tensor, scale: Tensor, bias: Tensor, k: int) -> Tensor:
        logits = scale * images @ all_texts[:, k].T + bias
        return -functional.logsigmoid(signs * logits).sum() / len(images)

    return _mean_of_facets(facet_loss, texts.shape[1], images, scale, bias)


LOSSES: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def _mean_of_facets(facet_loss: Callable[..., Tensor], facets: int, *inputs: Tensor) -> Tensor:
    # Many processes make the (B, A) matrices wide: computing those of a facet again for the
    # gradient needs memory for one facet only. One process keeps them, which is faster.
    if dist.is_initialized():
        losses = [checkpoint(facet_loss, *inputs, k, use_reentrant=False) for k in range(facets)]
    else:
        losses = [facet_loss(*inputs, k) for k in range(facets)]
    return torch.stack(losses).mean()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(features: Tensor) -> Tensor:
    if not dist.is_initialized():
        return features
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features.contiguous())
    return torch.cat(parts)


def _gather_with_gradient(features: Tensor) -> Tensor:
    return torch.cat(collectives.all_gather(features)) if dist.is_initialized() else features
