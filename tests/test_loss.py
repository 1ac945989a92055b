"""Both losses against their formulas, open_clip, and themselves in two processes."""

import math
import socket

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import multiprocessing as mp
from torch.nn import functional

from flame.loss import LOSSES, sigmoid_loss, softmax_loss

SCALE, BIAS = torch.tensor(1 / 0.07), torch.tensor(-3.0)


def features(images=6, facets=3, dim=8):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(images, dim, generator=rng), torch.randn(images, facets, dim, generator=rng)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_softmax_is_the_double_loop_of_equation_1():
    images, texts = features()
    num_images, num_facets = texts.shape[:2]
    total = 0.0
    for k in range(num_facets):
        for i in range(num_images):
            own = math.exp(cosine(images[i], texts[i, k]) / 0.07)
            all_texts = [math.exp(cosine(images[i], text[k]) / 0.07) for text in texts]
            all_images = [math.exp(cosine(image, texts[i, k]) / 0.07) for image in images]
            total -= (math.log(own / sum(all_texts)) + math.log(own / sum(all_images))) / 2
    expected = total / (num_images * num_facets)
    assert softmax_loss(images, texts, SCALE, BIAS).item() == pytest.approx(expected, rel=1e-5)


def test_softmax_with_one_facet_is_open_clips_loss():
    images, texts = features(facets=1)
    expected = ClipLoss()(
        functional.normalize(images, dim=-1), functional.normalize(texts[:, 0], dim=-1), SCALE
    )
    torch.testing.assert_close(softmax_loss(images, texts, SCALE, BIAS), expected)


def test_softmax_with_one_facet_does_not_tell_images_from_texts():
    images, texts = features(facets=1)
    swapped = softmax_loss(texts[:, 0], images[:, None], SCALE, BIAS)
    torch.testing.assert_close(softmax_loss(images, texts, SCALE, BIAS), swapped)


def test_sigmoid_is_the_sum_over_pairs_divided_by_the_number_of_texts():
    images, texts = features()
    num_images, num_facets = texts.shape[:2]
    total = 0.0
    for i in range(num_images):
        for j in range(num_images):
            for k in range(num_facets):
                logit = cosine(images[i], texts[j, k]) / 0.07 + BIAS.item()
                total += math.log1p(math.exp(-logit if i == j else logit))
    expected = total / (num_images * num_facets)
    assert sigmoid_loss(images, texts, SCALE, BIAS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_batch_and_of_facets_changes_nothing(name):
    images, texts = features()
    batch, facets = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([2, 0, 1])
    expected = LOSSES[name](images, texts, SCALE, BIAS)
    permuted = LOSSES[name](images[batch], texts[batch][:, facets], SCALE, BIAS)
    torch.testing.assert_close(permuted, expected)


def _share_of_gradient(rank, port, results):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results[rank] = {name: _loss_and_gradient(name, rank, 2) for name in LOSSES}
    torch.distributed.destroy_process_group()


def _loss_and_gradient(name, rank, processes):
    images, texts = features()
    weight = torch.eye(8).requires_grad_()
    loss = LOSSES[name]((images @ weight)[rank::processes], texts[rank::processes], SCALE, BIAS)
    loss.backward()
    return loss.item(), weight.grad.tolist()


def test_mean_over_two_processes_is_the_loss_and_gradient_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_share_of_gradient, (port, results), nprocs=2)
        first, second = results[0], results[1]
    for name in LOSSES:
        loss, gradient = _loss_and_gradient(name, 0, 1)
        assert (first[name][0] + second[name][0]) / 2 == pytest.approx(loss, rel=1e-5)
        mean = (torch.tensor(first[name][1]) + torch.tensor(second[name][1])) / 2
        torch.testing.assert_close(mean, torch.tensor(gradient), rtol=1e-4, atol=1e-5)
