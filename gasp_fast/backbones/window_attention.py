"""Window attention of Qwen's vision tower under SDPA: one call for all windows of equal length.

FlashAttention takes windows of any lengths in one call. SDPA does not, so transformers calls it once per window: some
27,000 calls for 24 frames of 896x504 pixels, each too small to use a GPU or a CPU well. But there are only a few window
lengths: whole windows, and those cut by the right edge, by the lower edge, by both. Windows of one length form a batch.
Every query sees the same keys as before; only the number of calls falls.

transformers offers no extension point for this: a function registered with `AttentionInterface` is called once per
window, too, after the tower has split its rows. Therefore `BatchedWindowAttention` replaces the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WindowRows:
    """The rows of each window, grouped by window length. All blocks of a tower share one instance.

    The boundaries of windows are a tensor on the device, and reading it makes the host wait. A tower passes the same
    two tensors to all its blocks (windows, and whole frames), so the groups of the last two are cached.
    """

    def __init__(self) -> None:
        self._recent: list[tuple[Tensor, list[Tensor]]] = []  # boundaries and their groups

    def __call__(self, boundaries: Tensor) -> list[Tensor]:
        """For `boundaries [W + 1]`, one index tensor `[windows, length]` for each length that occurs."""
        for known, groups in self._recent:
            if known is boundaries:
                return groups
        groups = group_by_length(boundaries)
        self._recent = [*self._recent[-1:], (boundaries, groups)]
        return groups


def group_by_length(boundaries: Tensor) -> list[Tensor]:
    """The rows of the windows between `boundaries [W + 1]`, one `[windows, length]` per length. Skips empty windows."""
    starts: dict[int, list[int]] = {}  # by length
    for start, end in pairwise(boundaries.tolist()):
        if end > start:
            starts.setdefault(end - start, []).append(start)
    return [
        torch.tensor(first, device=boundaries.device)[:, None] + torch.arange(length, device=boundaries.device)
        for length, first in starts.items()
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Softmax attention of rows `[S, H, d]` within each window of `groups`."""
    out = torch.empty_like(query)
    for rows in groups:  # [windows, length]
        q, k, v = (tensor[rows].transpose(1, 2) for tensor in (query, key, value))  # [windows, H, length, d]
        out = out.index_put((rows,), F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    return out


class BatchedWindowAttention(nn.Module):
    """Replaces `Qwen2_5_VLVisionAttention` and uses its projections, under the same parameter names.

    `rotate(query, key, cos, sin)` applies the tower's rotary embedding.
    """

    def __init__(self, original: Any, window_rows: WindowRows, rotate: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.qkv, self.proj = original.qkv, original.proj
        self.num_heads = original.num_heads
        self.window_rows, self.rotate = window_rows, rotate

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **options: Any,  # for other kinds of attention
    ) -> Tensor:
        """`hidden_states [S, D]`, window boundaries `cu_seqlens [W + 1]` -> `[S, D]`."""
        shape = (len(hidden_states), 3, self.num_heads, -1)
        query, key, value = self.qkv(hidden_states).reshape(shape).unbind(1)  # [S, H, d] each
        query, key = self.rotate(query, key, *position_embeddings)
        attended = attend(query, key, value, self.window_rows(cu_seqlens))
        return self.proj(attended.flatten(1))


def batch_windows(vision: Any) -> None:
    """Use `BatchedWindowAttention` in the blocks of Qwen's vision tower, if its attention is SDPA."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    if vision.config._attn_implementation != "sdpa":  # the field where transformers keeps the choice
        return
    window_rows = WindowRows()
    for block in vision.blocks:
        block.attn = BatchedWindowAttention(block.attn, window_rows, apply_rotary_pos_emb_vision)
