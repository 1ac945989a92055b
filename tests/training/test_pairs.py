"""Joining by key, and batches as a function of seed and step."""

import numpy as np
import pytest
import torch

from flame.training.pairs import Batches, Pairs

SIZE = 2


class FakeImages:
    """Image of key "7" is grey 7 everywhere, its second drawing 107."""

    def __init__(self, keys, drawings=1):
        self.keys, self.drawings = [str(key) for key in keys], drawings

    def request(self, indices, size, resize, drawing=0):
        greys = np.array([int(self.keys[i]) + 100 * drawing for i in indices], np.uint8)
        return lambda: np.tile(greys[:, None, None, None], (1, 3, size, size))


class FakeStore:
    """Row of key "7", facet number 1, holds (7, 1)."""

    def __init__(self, keys, facets=("a", "b", "c")):
        self.keys, self.facets = [str(key) for key in keys], facets

    def request(self, indices, facets):
        numbers = [self.facets.index(facet) for facet in facets]
        rows = [[(int(self.keys[i]), n) for n in numbers] for i in indices]
        return lambda: np.array(rows, dtype=np.float16)


def joined(images, max_skipped=0.0, cache_bytes=0, targets=None, drawings=1, **stores):
    targets = targets or dict.fromkeys(stores, ("a", "c"))
    fakes = {kind: FakeStore(keys) for kind, keys in stores.items()}
    return Pairs(
        FakeImages(images, drawings),
        fakes,
        targets,
        image_size=SIZE,
        max_skipped=max_skipped,
        cache_bytes=cache_bytes,
    )


def whole_epoch(batches, epoch=0):
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [batches[step] for step in steps]


def keys(batch):
    return batch.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_image_and_texts_of_a_row_have_one_key(cache_bytes):
    pairs = joined([5, 3, 8, 1], cache_bytes=cache_bytes, raw=[1, 3, 5, 8], long=[8, 5, 3, 1])
    assert pairs.cached == bool(cache_bytes)
    assert pairs.facets == [("raw", "a"), ("raw", "c"), ("long", "a"), ("long", "c")]
    batch = Batches(pairs, batch_size=4, epochs=1, seed=0)[0]
    assert sorted(keys(batch)) == [1, 3, 5, 8]
    assert batch.images.shape == (4, 3, SIZE, SIZE)
    for key, texts in zip(keys(batch), batch.texts.tolist(), strict=True):
        assert texts == [[key, 0], [key, 2], [key, 0], [key, 2]]


def test_what_does_not_join_is_counted():
    pairs = joined([1, 2, 3, 4], max_skipped=0.5, raw=[1, 2, 3], long=[2, 3, 4, 9])
    assert pairs.used == 2
    assert pairs.skipped == {
        "raw captions without image": 0,
        "long captions without image": 1,
        "images without raw caption": 1,
        "images without long caption": 1,
    }


def test_too_much_that_does_not_join_is_an_error_with_keys():
    with pytest.raises(ValueError, match=r"2 of 4 images without raw caption.*0\.25.*: 3, 4"):
        joined([1, 2, 3, 4], max_skipped=0.25, raw=[1, 2])
    with pytest.raises(ValueError, match=r"1 of 3 raw captions without image.*: 9"):
        joined([1, 2], max_skipped=0.25, raw=[1, 2, 9])


def test_a_kind_without_store_is_named():
    with pytest.raises(ValueError, match="'short'; there are: raw"):
        joined([1], targets={"short": ("a",)}, raw=[1])


def test_an_epoch_shows_each_pair_once_in_an_order_of_its_own():
    batches = Batches(joined(range(9), raw=range(9)), batch_size=3, epochs=2, seed=0)
    first, second = ([key for b in whole_epoch(batches, e) for key in keys(b)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second


def test_the_rest_of_an_epoch_is_dropped():
    batches = Batches(joined(range(10), raw=range(10)), batch_size=4, epochs=3, seed=0)
    assert len(batches) == 6


def test_a_batch_depends_on_seed_and_step_only():
    def batch(seed, *steps):
        pairs = joined(range(20), raw=[*range(20), *range(20)])
        batches = Batches(pairs, batch_size=5, epochs=3, seed=seed, facets_per_step=1)
        return [batches[step] for step in steps][-1]

    alone, after_others, other_seed = batch(0, 7), batch(0, 0, 11, 7), batch(1, 7)
    assert all(torch.equal(a, b) for a, b in zip(alone, after_others, strict=True))
    assert keys(alone) != keys(other_seed)


def test_all_captions_of_an_image_are_drawn_in_the_course_of_epochs():
    class Numbered(FakeStore):
        def request(self, indices, facets):
            return lambda: np.asarray(indices, dtype=np.float16)[:, None, None]

    store = Numbered([1, 2, 1, 1])
    pairs = Pairs(
        FakeImages([1, 2]), {"raw": store}, {"raw": ("a",)}, image_size=SIZE, max_skipped=0
    )
    batches = Batches(pairs, batch_size=2, epochs=30, seed=0)
    drawn = {1: set(), 2: set()}
    for step in range(len(batches)):
        for key, text in zip(keys(batches[step]), batches[step].texts.flatten(), strict=True):
            drawn[key].add(int(text))
    assert drawn == {1: {0, 2, 3}, 2: {1}}


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_an_epoch_shows_one_drawing_of_each_image(cache_bytes):
    pairs = joined(range(6), drawings=2, cache_bytes=cache_bytes, raw=range(6))
    assert pairs.cached == bool(cache_bytes)
    batches = Batches(pairs, batch_size=3, epochs=3, seed=0)
    for epoch, first in enumerate((0, 100, 0)):
        shown = [key for batch in whole_epoch(batches, epoch) for key in keys(batch)]
        assert sorted(shown) == list(range(first, first + 6))


def test_processes_share_the_batch_of_one():
    pairs = joined(range(12), raw=range(12), targets={"raw": ("a", "b", "c")})
    plan = {"batch_size": 6, "epochs": 1, "seed": 0, "facets_per_step": 2}
    alone = Batches(pairs, **plan)[1]
    shares = [Batches(pairs, **plan, rank=rank, processes=3)[1] for rank in range(3)]
    assert sorted(key for share in shares for key in keys(share)) == sorted(keys(alone))
    for share in shares:
        assert torch.equal(share.columns, alone.columns)
        assert share.texts[0, :, 1].tolist() == share.columns.tolist()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"batch_size": 7}, "batch_size 7 is more than the 6 pairs"),
        ({"batch_size": 5, "processes": 2}, "batch_size 5 is not divisible by 2"),
        ({"batch_size": 2, "facets_per_step": 3}, "facets_per_step 3 is more than the 2"),
    ],
)
def test_impossible_plans_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        Batches(joined(range(6), raw=range(6)), epochs=1, seed=0, **plan)
