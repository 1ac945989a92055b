"""The baselines: their towers against open_clip's, Long-CLIP's parts on small tensors."""

import socket
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import multiprocessing as mp
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from flame.study.schema.runs import Backbone, Recipe, TextTower
from flame.study.settings import ClipTraining, LongClipTraining
from flame.towers import model
from flame.towers.clip import FACET, ClipTower, LongClipTower, Tokens, principal, stretched
from flame.training.loss import softmax_loss
from flame.training.optim import adamw

SIZE = 32
# No batch norm in it, so a batch may be shared out among processes.
BACKBONE = Backbone(
    timm="vit_tiny_patch16_224",
    image_size=SIZE,
    args={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
)
TEXT_TOWER = TextTower(width=16, layers=2, heads=2, context_length=12, embed_dim=8)
TEXTS = ["a dog", "two red lanterns above a quiet harbour", "", "wow !_ a cat!"]
STRETCHED, KEPT = 30, 4


def recipe(**changes):
    plain = {"epochs": 1, "batch_size": 4, "lr": 1e-2, "weight_decay": 0.5, "warmup_steps": 1}
    return Recipe(**(plain | changes))


def shared(**changes):
    return {
        "run": "run",
        "seed": 0,
        "dataset": "dots",
        "backbone": BACKBONE,
        "recipe": recipe(**changes),
        "text_tower": TEXT_TOWER,
        "max_skipped": 0.0,
        "version": 1,
    }


def clip_settings(**changes):
    return ClipTraining(method="clip", captions="raw", **shared(**changes))


def long_settings(**changes):
    return LongClipTraining(
        method="long-clip",
        long="long",
        short="short",
        context_length=STRETCHED,
        kept_positions=KEPT,
        components=2,
        **shared(**changes),
    )


def clip_tower():
    torch.manual_seed(0)
    return ClipTower(BACKBONE, recipe(), TEXT_TOWER)


@pytest.fixture
def base(tmp_path):
    """Folder of a CLIP run, with a temperature that was trained."""
    tower = clip_tower()
    torch.nn.init.constant_(tower.log_scale, 3.0)
    (tmp_path / "base").mkdir()
    record = {"settings": clip_settings().model_dump(mode="json"), "dim": tower.dim}
    model.save(tower, tmp_path / "base", record)
    return tmp_path / "base"


@pytest.fixture
def long_tower(base):
    torch.manual_seed(1)
    tower = LongClipTower(long_settings(tau=0.01))
    tower.start_from(base)
    tower.match([("long", FACET), ("short", FACET)])
    return tower


def captions(folder: Path):
    rows = [
        ("k1", "raw", "a dog"),
        ("k0", "long", "wow"),
        ("k1", "raw", "b " * 20),
        ("k2", "raw", ""),
    ]
    path = folder / "captions.parquet"
    pl.DataFrame(rows, schema=["key", "kind", "text"], orient="row").write_parquet(path)
    return path


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_tokens_are_open_clips_in_the_order_asked_for(tmp_path, cache_bytes):
    tokens = Tokens(captions(tmp_path), "raw", 8, cache_bytes=cache_bytes)
    assert tokens.keys == ["k1", "k1", "k2"]
    rows = tokens.rows(np.array([2, 0, 1, 0]), (FACET,))
    assert rows.shape == (4, 1, 8)
    expected = SimpleTokenizer(context_length=8)(["", "a dog", "b " * 20, "a dog"])
    assert rows[:, 0].tolist() == expected.tolist()
    assert rows[2, 0, -1] == rows[0, 0, 1] == SimpleTokenizer().eot_token_id
    assert np.array_equal(tokens.rows(np.array([2, 0, 1, 0])), rows)


def test_a_kind_without_captions_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'row'.*did you mean 'raw'.*known: raw, long"):
        Tokens(captions(tmp_path), "row", 8)


@pytest.mark.parametrize("training", [True, False])
def test_text_features_are_open_clips_without_what_stands_behind_the_end(training):
    tower = clip_tower().train(training)
    tokens = tower.tokenize(TEXTS)
    assert tokens.shape == (4, 12)
    # A "!" within a word is token 0, as padding is: only the end token tells where a text ends.
    assert 0 in tokens[3, : tokens[3].argmax()]
    with torch.no_grad():
        features = tower.encode_text(TEXTS)
        torch.testing.assert_close(features, tower.text(tokens), rtol=1e-4, atol=1e-5)
        alone = torch.cat([tower.encode_text([text]) for text in TEXTS])
    assert features.shape == (4, 8)
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)


def test_image_features_are_a_linear_map_of_the_backbones():
    tower = clip_tower().eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    seen = tower.visual((images - tower.mean) / tower.std)
    expected = seen @ tower.projection.weight.T
    torch.testing.assert_close(tower.encode_image(images), expected)
    flame = model.FlameTower(BACKBONE, recipe(), 8)
    assert torch.equal(tower.mean, flame.mean)
    assert torch.equal(tower.std, flame.std)


def test_loss_of_a_step_is_that_of_the_encoded_texts():
    tower = clip_tower().eval()
    tower.match([("raw", FACET)])
    images, columns = torch.rand(4, 3, SIZE, SIZE), torch.tensor([0])
    outputs = tower(images, tower.tokenize(TEXTS)[:, None].int(), columns)
    expected = softmax_loss(
        tower.encode_image(images),
        tower.encode_text(TEXTS)[:, None],
        torch.tensor(1 / 0.07),
        tower.bias,
    )
    torch.testing.assert_close(tower.loss(outputs, columns), expected)


@pytest.mark.parametrize("settings", [clip_settings(), long_settings()])
def test_loaded_tower_equals_the_saved_one(tmp_path, settings):
    tower = model.create(settings).eval()
    record = {"settings": settings.model_dump(mode="json"), "dim": tower.dim}
    model.save(tower, tmp_path, record)
    loaded, found = model.load(tmp_path)
    assert type(loaded) is type(tower)
    assert found == record
    assert not loaded.training
    assert loaded.centers == {}
    images = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(loaded.encode_image(images), tower.encode_image(images))
    assert torch.equal(loaded.encode_text(TEXTS), tower.encode_text(TEXTS))


def test_stretching_is_read_off_the_old_line():
    # 5 rows become 8, 2 of them kept: each of the other 3 makes 2.
    old = torch.tensor([[7.0], [-1.0], [10.0], [20.0], [40.0]])
    new = [7.0, -1.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0]
    assert stretched(old, 8, 2).flatten().tolist() == new


def test_77_positions_become_248_as_in_long_clip():
    old = torch.randn(77, 3, generator=torch.Generator().manual_seed(0))
    new = stretched(old, 248, 20)
    assert new.shape == (248, 3)
    assert torch.equal(new[:20], old[:20])
    # Four new rows for every old one, so each old row comes back.
    torch.testing.assert_close(new[20::4], old[20:])
    torch.testing.assert_close(new[23], old[20] / 4 + 3 * old[21] / 4)
    torch.testing.assert_close(new[247], old[76] + 3 * (old[76] - old[75]) / 4)


@pytest.mark.parametrize(("length", "kept"), [(4, 2), (8, 4)])
def test_positions_that_cannot_be_stretched_are_refused(length, kept):
    with pytest.raises(ValueError, match=f"5 positions, {kept} of them kept.*{length}"):
        stretched(torch.zeros(5, 1), length, kept)


def test_long_clip_starts_as_its_base(long_tower, base):
    clip, _ = model.load(base)
    images, short = torch.rand(2, 3, SIZE, SIZE), ["a", "a b"]  # within the kept positions
    long_tower.eval()
    assert torch.equal(long_tower.encode_image(images), clip.encode_image(images))
    torch.testing.assert_close(long_tower.encode_text(short), clip.encode_text(short))
    assert long_tower.log_scale.exp().item() == pytest.approx(100)
    assert long_tower.tokenize(["a " * 40]).shape == (1, STRETCHED)


def test_a_base_of_other_sizes_is_refused(base):
    wider = TEXT_TOWER.model_copy(update={"width": 32})
    settings = long_settings().model_copy(update={"text_tower": wider})
    with pytest.raises(ValueError, match=r"base: text_tower .*'width': 16.*, not .*'width': 32"):
        LongClipTower(settings).start_from(base)


def test_kept_positions_do_not_move_and_others_do(long_tower):
    before = long_tower.text.positional_embedding.detach().clone()
    optimizer = adamw(long_tower, recipe())
    columns = torch.tensor([0, 1])
    texts = torch.stack([long_tower.tokenize(["x " * 40] * 4), long_tower.tokenize(TEXTS)], dim=1)
    for _ in range(2):
        long_tower.loss(
            long_tower(torch.rand(4, 3, SIZE, SIZE), texts, columns), columns
        ).backward()
        optimizer.step()
    after = long_tower.text.positional_embedding.detach()
    assert torch.equal(after[:KEPT], before[:KEPT])
    assert (after[KEPT:] != before[KEPT:]).any(dim=1).all()


def test_loss_is_that_of_long_texts_and_of_short_ones_with_coarse_images(long_tower):
    images, columns = torch.rand(4, 3, SIZE, SIZE), torch.tensor([0, 1])
    texts = torch.stack([long_tower.tokenize(TEXTS[::-1]), long_tower.tokenize(TEXTS)], dim=1)
    outputs = long_tower(images, texts, columns)
    features = normalize(outputs.images, dim=-1)
    coarse = principal(features, 2)
    assert not torch.allclose(coarse, features, atol=1e-3)
    long, short = (
        softmax_loss(seen, outputs.texts[:, k : k + 1], outputs.scale, outputs.bias)
        for k, seen in enumerate((features, coarse))
    )
    torch.testing.assert_close(long_tower.loss(outputs, columns), long + short)


def features(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rows", "width"), [(20, 6), (6, 20)])
def test_principal_keeps_mean_and_as_many_axes_as_asked(rows, width):
    whole = features(rows, width)
    reduced = principal(whole, 3)
    torch.testing.assert_close(reduced.mean(dim=0), whole.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(reduced - reduced.mean(dim=0), rtol=1e-4) == 3
    # Of all matrices of this rank, the nearest: what is missing are the other singular values.
    others = torch.linalg.svdvals(whole - whole.mean(dim=0))[3:]
    torch.testing.assert_close((whole - reduced).norm(), others.norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(principal(whole, min(rows - 1, width)), whole)


def test_gradient_of_principal_is_that_of_an_svd():
    weight = features(12, 5).double().flip(0)
    gradients = []
    for reduce in (lambda x: principal(x, 2), _by_svd):
        leaf = features(12, 5).double().requires_grad_()
        (reduce(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    still = features(12, 5).double()
    axes = torch.linalg.svd(still - still.mean(dim=0))[2][:2]
    fixed = weight.mean(dim=0) + (weight - weight.mean(dim=0)) @ axes.T @ axes
    assert not torch.allclose(gradients[0], fixed, atol=1e-2)  # the axes do turn


def _by_svd(x):
    centered = x - x.mean(dim=0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][:2]
    return centered @ axes.T @ axes + x.mean(dim=0)


def test_gradient_of_principal_is_finite_where_that_of_an_svd_is_not():
    leaf = torch.eye(6)[[0, 0, 1, 1, 2, 2]].requires_grad_()  # equal and zero singular values
    (principal(leaf, 1) * features(6, 6)).sum().backward()
    assert leaf.grad.isfinite().all()


def _share_of_gradient(rank, port, folder, results):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results[rank] = _loss_and_gradient(folder, rank, 2)
    torch.distributed.destroy_process_group()


def _loss_and_gradient(folder, rank, processes):
    tower = model.load(folder)[0].train()
    tower.match([("long", FACET), ("short", FACET)])
    wrapped = DistributedDataParallel(tower) if processes > 1 else tower
    columns = torch.tensor([0, 1])
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    words = [f"{'very ' * n}large house" for n in range(6)]
    texts = torch.stack([tower.tokenize(words), tower.tokenize(words[::-1])], dim=1)
    mine = slice(rank, None, processes)
    loss = tower.loss(wrapped(images[mine], texts[mine], columns), columns)
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in tower.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def test_two_processes_have_the_loss_and_gradient_of_one(long_tower, tmp_path):
    record = {"settings": long_settings().model_dump(mode="json"), "dim": long_tower.dim}
    (tmp_path / "run").mkdir()
    model.save(long_tower, tmp_path / "run", record)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_share_of_gradient, (port, tmp_path / "run", results), nprocs=2)
        (first, gradients), (second, _) = results[0], results[1]
    loss, expected = _loss_and_gradient(tmp_path / "run", 0, 1)
    assert (first + second) / 2 == pytest.approx(loss, rel=1e-5)
    assert "text.token_embedding.weight" in gradients
    assert "visual.patch_embed.proj.weight" in gradients
    for name, value in expected.items():
        np.testing.assert_allclose(gradients[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
