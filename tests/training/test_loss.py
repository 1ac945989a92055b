"""The losses against their formulas, open_clip, and themselves in two processes."""

import json
import math
import socket
from itertools import product

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from flame.study.schema.runs import Recipe
from flame.towers.flame import FlameTower
from flame.training.loss import (
    LOSSES,
    StepLoss,
    criterion,
    kind_weights,
    principal,
    sigmoid_loss,
    softmax_loss,
    step_loss,
)
from flame.training.tokens import FACET
from tests.towers.test_clip import SIZE, TEXTS, clip_settings, clip_tower
from tests.towers.test_flame import CNN
from tests.towers.test_long_clip import FACETS, long_clip_tower

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


def test_kinds_that_weigh_the_same_weigh_so_in_the_loss_of_a_step():
    images, texts = torch.rand(4, 3, 32, 32), torch.randn(4, 3, 24).half()
    losses = {}
    for weigh in ("facets", "kinds"):
        torch.manual_seed(0)
        tower = FlameTower(CNN, recipe(weigh=weigh), 24).eval()
        facets = [("long", "a"), ("long", "b"), ("raw", "a")]
        tower.match(facets)
        loss = StepLoss(recipe(weigh=weigh), facets)
        columns = torch.tensor([0, 1, 2])
        losses[weigh] = loss(tower(images, texts, columns), columns)
        alone = [
            loss(tower(images, texts[:, k : k + 1], columns[k : k + 1]), columns[k : k + 1])
            for k in range(3)
        ]
    torch.testing.assert_close(losses["facets"], sum(alone) / 3)
    torch.testing.assert_close(losses["kinds"], alone[0] / 4 + alone[1] / 4 + alone[2] / 2)


def test_loss_of_a_step_is_that_of_the_encoded_texts():
    tower = clip_tower().eval()
    loss = step_loss(clip_settings(), [("raw", FACET)])
    images, columns = torch.rand(4, 3, SIZE, SIZE), torch.tensor([0])
    outputs = tower(images, tower.tokenize(TEXTS)[:, None].int(), columns)
    expected = softmax_loss(
        tower.encode_image(images),
        tower.encode_text(TEXTS)[:, None],
        torch.tensor(1 / 0.07),
        tower.bias,
    )
    torch.testing.assert_close(loss(outputs, columns), expected)


def test_loss_is_that_of_long_texts_and_of_short_ones_with_coarse_images():
    long_tower = long_clip_tower()
    images, columns = torch.rand(4, 3, SIZE, SIZE), torch.tensor([0, 1])
    texts = torch.stack([long_tower.tokenize(TEXTS[::-1]), long_tower.tokenize(TEXTS)], dim=1)
    outputs = long_tower(images, texts, columns)
    whole = normalize(outputs.images, dim=-1)
    coarse = principal(whole, 2)
    assert not torch.allclose(coarse, whole, atol=1e-3)
    long, short = (
        softmax_loss(seen, outputs.texts[:, k : k + 1], outputs.scale, outputs.bias)
        for k, seen in enumerate((whole, coarse))
    )
    loss = step_loss(long_tower.settings, FACETS)
    torch.testing.assert_close(loss(outputs, columns), long + short)


def matrix(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rows", "width"), [(20, 6), (6, 20)])
def test_principal_keeps_mean_and_as_many_axes_as_asked(rows, width):
    whole = matrix(rows, width)
    reduced = principal(whole, 3)
    torch.testing.assert_close(reduced.mean(dim=0), whole.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(reduced - reduced.mean(dim=0), rtol=1e-4) == 3
    # Of all matrices of this rank, the nearest: what is missing are the other singular values.
    others = torch.linalg.svdvals(whole - whole.mean(dim=0))[3:]
    torch.testing.assert_close((whole - reduced).norm(), others.norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(principal(whole, min(rows - 1, width)), whole)


def test_gradient_of_principal_is_that_of_an_svd():
    weight = matrix(12, 5).double().flip(0)
    gradients = []
    for reduce in (lambda x: principal(x, 2), _by_svd):
        leaf = matrix(12, 5).double().requires_grad_()
        (reduce(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    still = matrix(12, 5).double()
    axes = torch.linalg.svd(still - still.mean(dim=0))[2][:2]
    fixed = weight.mean(dim=0) + (weight - weight.mean(dim=0)) @ axes.T @ axes
    assert not torch.allclose(gradients[0], fixed, atol=1e-2)  # the axes do turn


def _by_svd(x):
    centered = x - x.mean(dim=0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][:2]
    return centered @ axes.T @ axes + x.mean(dim=0)


def test_gradient_of_principal_is_finite_where_that_of_an_svd_is_not():
    leaf = torch.eye(6)[[0, 0, 1, 1, 2, 2]].requires_grad_()  # equal and zero singular values
    (principal(leaf, 1) * matrix(6, 6)).sum().backward()
    assert leaf.grad.isfinite().all()


def _share_of_long_clip(rank, port, weights, results):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results[rank] = _long_clip_loss_and_gradient(weights, rank, 2)
    torch.distributed.destroy_process_group()


def _long_clip_loss_and_gradient(weights, rank, processes):
    tower = long_clip_tower().train()
    tower.load_state_dict(weights)
    wrapped = DistributedDataParallel(tower) if processes > 1 else tower
    columns = torch.tensor([0, 1])
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    words = [f"{'very ' * n}large house" for n in range(6)]
    texts = torch.stack([tower.tokenize(words), tower.tokenize(words[::-1])], dim=1)
    mine = slice(rank, None, processes)
    outputs = wrapped(images[mine], texts[mine], columns)
    loss = step_loss(tower.settings, FACETS)(outputs, columns)
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in tower.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def test_two_processes_have_the_loss_and_gradient_of_one_long_clip():
    weights = long_clip_tower().state_dict()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_share_of_long_clip, (port, weights, results), nprocs=2)
        (first, gradients), (second, _) = results[0], results[1]
    loss, expected = _long_clip_loss_and_gradient(weights, 0, 1)
    assert (first + second) / 2 == pytest.approx(loss, rel=1e-5)
    assert "text.token_embedding.weight" in gradients
    assert "visual.patch_embed.proj.weight" in gradients
    for name, value in expected.items():
        np.testing.assert_allclose(gradients[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
