"""Long-CLIP: a stretched CLIP whose first positions are frozen."""

import pytest
import torch

from flame.study.settings import LongClipTraining
from flame.towers.long_clip import LongClipTower, stretched
from flame.training.loss import step_loss
from flame.training.optim import adamw
from flame.training.tokens import FACET
from tests.towers.test_clip import (
    SIZE,
    TEXT_TOWER,
    TEXTS,
    clip_settings,
    clip_tower,
    recipe,
    shared,
)

STRETCHED, KEPT = 30, 4
FACETS = [("long", FACET), ("short", FACET)]


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


def trained_clip():
    """A CLIP with a temperature that is not the initial one."""
    tower = clip_tower()
    torch.nn.init.constant_(tower.log_scale, 3.0)
    return tower


def long_clip_tower():
    torch.manual_seed(1)
    tower = LongClipTower(long_settings(tau=0.01))
    tower.start_from(trained_clip().state_dict(), clip_settings().model_dump(mode="json"))
    return tower


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


def test_long_clip_starts_as_its_base():
    clip, long_tower = trained_clip().eval(), long_clip_tower().eval()
    images, short = torch.rand(2, 3, SIZE, SIZE), ["a", "a b"]  # within the kept positions
    assert torch.equal(long_tower.encode_image(images), clip.encode_image(images))
    torch.testing.assert_close(long_tower.encode_text(short), clip.encode_text(short))
    assert long_tower.log_scale.exp().item() == pytest.approx(100)
    assert long_tower.tokenize(["a " * 40]).shape == (1, STRETCHED)


def test_a_base_of_other_sizes_is_refused():
    wider = TEXT_TOWER.model_copy(update={"width": 32})
    tower = LongClipTower(long_settings().model_copy(update={"text_tower": wider}))
    with pytest.raises(ValueError, match=r"text_tower .*'width': 16.*, not .*'width': 32"):
        tower.start_from(trained_clip().state_dict(), clip_settings().model_dump(mode="json"))


def test_kept_positions_do_not_move_and_others_do():
    long_tower = long_clip_tower()
    loss = step_loss(long_tower.settings, FACETS)
    before = long_tower.text.positional_embedding.detach().clone()
    optimizer = adamw(long_tower, recipe())
    columns = torch.tensor([0, 1])
    texts = torch.stack([long_tower.tokenize(["x " * 40] * 4), long_tower.tokenize(TEXTS)], dim=1)
    for _ in range(2):
        loss(long_tower(torch.rand(4, 3, SIZE, SIZE), texts, columns), columns).backward()
        optimizer.step()
    after = long_tower.text.positional_embedding.detach()
    assert torch.equal(after[:KEPT], before[:KEPT])
    assert (after[KEPT:] != before[KEPT:]).any(dim=1).all()
