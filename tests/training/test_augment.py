"""Random crops keep their draws and their bits, and never flip."""

import pytest
import torch
from torch.nn.functional import affine_grid, grid_sample

from flame.training.augment import crop, draw_crops


def augmented(images, generator, **how):
    return crop(images, draw_crops(len(images), images.shape[-2:], generator, **how))


def test_augment_without_range_changes_nothing():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    same = augmented(images, torch.Generator(), scale=(1, 1), shift=0)
    assert torch.equal(same, images.float() / 255)


def test_shift_moves_whole_pixels_and_repeats_the_edge():
    images = torch.rand(64, 3, 8, 8)
    moved = augmented(images, torch.Generator().manual_seed(0), scale=(1, 1), shift=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    windows = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)])
    gaps = (windows - moved).abs().amax((2, 3, 4))
    assert gaps.min(0).values.max() < 1e-5
    assert len(set(gaps.argmin(0).tolist())) > 15


def test_crops_stay_inside_and_are_never_flipped():
    ramp = torch.linspace(0, 1, 16).expand(100, 3, 16, 16)
    crops = augmented(ramp, torch.Generator().manual_seed(0), scale=(0.5, 1), shift=0)
    assert (crops.diff(dim=-1) >= 0).all()
    assert crops.min() >= 0
    assert crops.max() <= 1
    width = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert 0.68 < width.min() < 0.75
    assert width.max() > 0.95


def test_same_generator_gives_the_same_crops():
    images = torch.rand(4, 3, 8, 8)
    one, two = (
        augmented(images, torch.Generator().manual_seed(5), scale=(0.5, 1), shift=2)
        for _ in range(2)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("size", [(16, 16), (37, 23), (224, 224)])
def test_crops_are_those_of_torchs_affine_grid(size):
    """To the bit; the product inside affine_grid would be less exact with TF32."""
    images = torch.rand(6, 3, *size)
    crops = draw_crops(6, size, torch.Generator().manual_seed(0), scale=(0.4, 1), shift=3)
    theta = torch.zeros(6, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = crops[:, 0]
    theta[:, :, 2] = crops[:, 1:]
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    expected = grid_sample(images, grid, padding_mode="border", align_corners=False)
    assert torch.equal(crop(images, crops), expected.clamp(0, 1))


def test_processes_and_micro_batches_have_the_crops_of_the_whole_batch():
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    how = {"scale": (0.5, 1), "shift": 2}
    whole = augmented(images, torch.Generator().manual_seed(0), **how)
    for rank in range(2):
        own = images[rank::2]
        crops = draw_crops(
            4, (16, 16), torch.Generator().manual_seed(0), **how, rank=rank, processes=2
        )
        parts = [crop(own[part], crops[part]) for part in (slice(0, 1), slice(1, 4))]
        assert torch.equal(torch.cat(parts), whole[rank::2])
