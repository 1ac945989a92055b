"""Both losses against their formulas, open_clip, and themselves in two processes."""

import json
import math
import socket
from itertools import product

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from flame.study.schema.runs import Recipe
from flame.training.loss import LOSSES, criterion, kind_weights, sigmoid_loss, softmax_loss

SCALE, BIAS = torch.tensor(1 / 0.07), torch.tensor(-3.0)
CASES = list(product(LOSSES, ("facets", "kinds"), (False, True)))  # True: texts are trained too


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


def test_label_smoothing_mixes_the_labels_with_all_labels_alike():
    images, texts = features(facets=1)
    logits = SCALE * functional.normalize(images, dim=-1) @ functional.normalize(texts[:, 0]).T
    labels = 0.9 * torch.eye(6) + 0.1 / 6
    expected = -sum((labels * logits.log_softmax(dim)).sum() / 6 for dim in (0, 1)) / 2
    smooth = criterion(recipe(label_smoothing=0.1))
    torch.testing.assert_close(smooth(images, texts, SCALE, BIAS, None), expected)
    assert criterion(recipe()) is softmax_loss
    with pytest.raises(ValueError, match=r"label_smoothing 0\.1 with loss 'sigmoid'"):
        criterion(recipe(label_smoothing=0.1, loss="sigmoid"))


def recipe(**changes):
    plain = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 1}
    return Recipe(**(plain | changes))


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


# Two long facets, one short, one raw.
KINDS = ["long", "long", "short", "raw"]


def test_kind_weights_divide_the_share_of_a_kind_among_its_facets():
    torch.testing.assert_close(kind_weights(KINDS), torch.tensor([1 / 6, 1 / 6, 1 / 3, 1 / 3]))
    # Of facets drawn at a step a kind may be missing; then the others share its part.
    torch.testing.assert_close(
        kind_weights(["long", "raw", "long"]), torch.tensor([0.25, 0.5, 0.25])
    )


@pytest.mark.parametrize("name", LOSSES)
def test_kind_weights_take_the_mean_of_the_losses_of_each_kind_alone(name):
    images, texts = features(facets=len(KINDS))
    alone = [LOSSES[name](images, texts[:, k], SCALE, BIAS) for k in ([0, 1], [2], [3])]
    weighted = LOSSES[name](images, texts, SCALE, BIAS, kind_weights(KINDS))
    torch.testing.assert_close(weighted, torch.stack(alone).mean())
    assert abs(weighted - LOSSES[name](images, texts, SCALE, BIAS)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_kind_weights_change_nothing_with_one_facet_a_kind(name):
    images, texts = features(facets=3)
    weighted = LOSSES[name](images, texts, SCALE, BIAS, kind_weights(["long", "short", "raw"]))
    torch.testing.assert_close(weighted, LOSSES[name](images, texts, SCALE, BIAS))


@pytest.mark.parametrize("name", LOSSES)
def test_facet_of_weight_0_leaves_loss_and_gradient(name):
    images, texts = features(facets=2)
    values = []
    for chosen, weights in ((texts, torch.tensor([1.0, 0.0])), (texts[:, :1], None)):
        leaf = images.clone().requires_grad_()
        loss = LOSSES[name](leaf, chosen, SCALE, BIAS, weights)
        loss.backward()
        values.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*values)


def _share_of_gradient(rank, port, results):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results[rank] = {case: _loss_and_gradient(*case, rank, 2) for case in CASES}
    torch.distributed.destroy_process_group()


def _loss_and_gradient(name, weigh, trained, rank, processes):
    images, texts = features()
    weight, text_weight = torch.eye(8).requires_grad_(), torch.eye(8).requires_grad_()
    weights = kind_weights(["long", "raw", "long"]) if weigh == "kinds" else None
    mine = slice(rank, None, processes)
    texts = texts @ text_weight if trained else texts
    loss = LOSSES[name]((images @ weight)[mine], texts[mine], SCALE, BIAS, weights)
    loss.backward()
    return loss.item(), (text_weight if trained else weight).grad.tolist()


def test_mean_over_two_processes_is_the_loss_and_gradient_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_share_of_gradient, (port, results), nprocs=2)
        first, second = results[0], results[1]
    for case in CASES:
        loss, gradient = _loss_and_gradient(*case, 0, 1)
        assert (first[case][0] + second[case][0]) / 2 == pytest.approx(loss, rel=1e-5)
        mean = (torch.tensor(first[case][1]) + torch.tensor(second[case][1])) / 2
        torch.testing.assert_close(mean, torch.tensor(gradient), rtol=1e-4, atol=1e-5)


def _peak(name, facets, file, images=256):
    """Largest memory that a loss and its gradient take, in (A, A) matrices of float32."""
    features, texts = (torch.randn(images, *shape, 8) for shape in ((), (facets,)))
    features.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        LOSSES[name](features, texts, SCALE, BIAS).backward()
    watched.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    taken = [event["args"] for event in events if event["name"] == "[memory]"]
    before = taken[0]["Total Allocated"] - taken[0]["Bytes"]
    return (max(each["Total Allocated"] for each in taken) - before) / (4 * images**2)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_many_processes_keeps_the_matrices_of_one_facet_only(name, tmp_path):
    few, many = (_peak(name, facets, tmp_path / "trace.json") for facets in (2, 8))
    assert many > few + 6
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        few, many = (_peak(name, facets, tmp_path / "trace.json") for facets in (2, 8))
    finally:
        dist.destroy_process_group()
    assert many < few + 1
    assert many < 7
