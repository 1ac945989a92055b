"""The mask of Section 3.3, and attention under it."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from flame.embedding.attention import facet_mask, masked_attention


def test_facet_mask_by_hand():
    rows = ["1....", "11...", "111..", "11.1.", "11.11"]
    expected = torch.tensor([[cell == "1" for cell in row] for row in rows])
    assert torch.equal(facet_mask(2, [1, 2]), expected)


def test_masked_attention_is_torchs_with_shared_key_heads():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    visible = facet_mask(2, [1, 2])[2:].expand(2, 1, -1, -1)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=0.3, enable_gqa=True
    )
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(masked_attention(query, key, value, mask, scaling=0.3), expected)
