"""Attention of all tokens to all that they may see, in slices, without a mask of all queries x keys.

Only the tail, which is causal, has a mask of its own where FlashAttention does not run, as on a CPU.

Every token of the prefix sees the prefix up to itself. Every token of the tail sees prefix, block and the tail up to
itself: prefix and block never see the tail, and no token sees the padding behind it. What a frame of the block sees
beside the prefix is the pattern of the layer:

| attention      | a frame sees                                                                                      |
| -------------- | ------------------------------------------------------------------------------------------------- |
| `global`       | all frames                                                                                        |
| `block_causal` | itself and the frames before it                                                                   |
| `frame`        | itself                                                                                            |
| `mixed`        | itself in layers 0, 2, 4, ..., all frames in layers 1, 3, 5, ...: our reading, as in VGGT          |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .tokens import Arrangement

PATTERNS = ("global", "block_causal", "frame")
ATTENTIONS = (*PATTERNS, "mixed")


def pattern_of(attention: str, layer: int) -> str:
    """The pattern of a layer."""
    if attention == "mixed":
        return "global" if layer % 2 else "frame"
    return attention


def joint_attention(query: Tensor, key: Tensor, value: Tensor, arrangement: Arrangement, pattern: str) -> Tensor:
    """Tokens in the order of `tokens`: [B, heads, N, d], twice [B, key heads, N, d] -> [B, heads, N, d]."""
    block, context = arrangement.block, arrangement.context
    attended = []
    if block:
        attended.append(_block(query[:, :, :block], key[:, :, :context], value[:, :, :context], arrangement, pattern))
    if arrangement.prefix:
        q, k, v = (states[:, :, block:context] for states in (query, key, value))
        attended.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    if arrangement.tail:
        attended.append(tail_attention(query[:, :, context:], key, value))
    return torch.cat(attended, 2)


def tail_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries of the last n of N tokens: [B, heads, n, d], twice [B, key heads, N, d] -> [B, heads, n, d]."""
    count = query.shape[2]
    seen = None if count == 1 else _last_triangle(count, key.shape[2], query.device)
    return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)


def attended_pairs(arrangement: Arrangement, pattern: str) -> int:
    """Pairs of a query and a key that it sees, in one sequence and one head."""
    frames, prefix, tail = arrangement.frames, arrangement.prefix, arrangement.tail
    tokens = arrangement.rows * arrangement.columns + 2  # of a frame
    seen = {"global": frames * frames, "block_causal": frames * (frames + 1) // 2, "frame": frames}[pattern]
    block = seen * tokens * tokens + arrangement.block * prefix
    return block + prefix * (prefix + 1) // 2 + tail * arrangement.context + tail * (tail + 1) // 2


def _last_triangle(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query sees, where the last keys are the queries' own: no mask where FlashAttention runs."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)  # torch makes a mask of it in float32
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _block(query: Tensor, key: Tensor, value: Tensor, arrangement: Arrangement, pattern: str) -> Tensor:
    """Queries of the block, keys of block and prefix."""
    if pattern == "global":
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    q = _by_frame(query, arrangement)  # [B, heads, F, P + 2, d]
    k, v = (_by_frame(states[:, :, : arrangement.block], arrangement) for states in (key, value))
    of_prefix = [states[:, :, arrangement.block :] for states in (key, value)]
    attended = []
    for frame in range(arrangement.frames):
        first = frame if pattern == "frame" else 0
        seen = [states[:, :, first : frame + 1].flatten(2, 3) for states in (k, v)]
        keys, values = (torch.cat(parts, 2) for parts in zip(seen, of_prefix, strict=True))
        attended.append(F.scaled_dot_product_attention(q[:, :, frame], keys, values, enable_gqa=True))
    return _as_block(torch.stack(attended, 2), arrangement)


def _by_frame(states: Tensor, arrangement: Arrangement) -> Tensor:
    """The block, ordered by frames: [B, heads, block, d] -> [B, heads, F, P + 2, d]."""
    patches, marks = states.split([arrangement.patches, arrangement.marks], 2)
    frames = arrangement.frames
    return torch.cat([patches.unflatten(2, (frames, -1)), marks.unflatten(2, (frames, 2))], 3)


def _as_block(states: Tensor, arrangement: Arrangement) -> Tensor:
    """The reverse of `_by_frame`."""
    patches, marks = states.split([arrangement.rows * arrangement.columns, 2], 3)
    return torch.cat([patches.flatten(2, 3), marks.flatten(2, 3)], 2)
