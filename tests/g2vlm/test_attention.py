"""Joint attention in slices equals attention under a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_g2vlm import memory_order, visible

from gasp_fast.g2vlm.attention import attended_pairs, joint_attention, pattern_of
from gasp_fast.g2vlm.tokens import Arrangement

PACKS = [(3, 2, 3, 4, 5), (3, 2, 3, 0, 0), (2, 1, 4, 0, 3), (0, 0, 0, 3, 4), (1, 2, 2, 3, 0)]
PATTERNS = {
    "global": ["global"] * 4,
    "block_causal": ["block_causal"] * 4,
    "frame": ["frame"] * 4,
    "mixed": ["frame", "global", "frame", "global"],
}


@pytest.mark.parametrize("pack", PACKS, ids=str)
@pytest.mark.parametrize("attention", PATTERNS)
def test_it_equals_a_dense_mask(attention, pack):
    """In ragged tails, too: real tokens see no padding, wherever it begins."""
    frames, rows, columns, prefix, tail = pack
    arrangement = Arrangement(*pack)
    generator = torch.Generator().manual_seed(0)
    order = memory_order(frames, rows * columns, prefix, tail)
    query = torch.randn(2, 4, len(order), 8, generator=generator)
    key, value = torch.randn(2, 2, 2, len(order), 8, generator=generator)
    real = torch.ones(2, len(order), dtype=torch.bool)
    real[1, len(order) - tail // 2 :] = False
    for layer, pattern in enumerate(PATTERNS[attention]):
        assert pattern_of(attention, layer) == pattern
        seen = visible(frames, rows * columns, prefix, tail, pattern)
        assert attended_pairs(arrangement, pattern) == seen.sum()
        mask = seen[order][:, order] & real[:, None]  # [B, N, N]
        keys, values = (states.repeat_interleave(2, 1) for states in (key, value))
        expected = F.scaled_dot_product_attention(query, keys, values, mask[:, None])
        ours = joint_attention(query, key, value, arrangement, pattern)
        of_real = real[:, None, :, None].expand_as(ours)
        torch.testing.assert_close(ours[of_real], expected[of_real], atol=1e-6, rtol=1e-5)
