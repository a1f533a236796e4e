"""Attention in windows, all windows of a length at once: Qwen's vision tower under SDPA.

FlashAttention takes windows of any lengths in one call. SDPA does not, and transformers then calls it once for every
window: some 27,000 calls for 24 frames of 896x504 pixels, each too small to fill a GPU (or to be worth a call on a
CPU). But windows come in a handful of lengths: whole ones, those cut by the right edge, by the lower edge, by both.
Windows of one length are one batch. Every query meets the same keys as before; only the calls are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Windows:
    """The rows of each window, grouped by length. Layers share one instance, as they share their window limits."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, list[Tensor]]] = []  # limits of windows, as last seen, and their rows

    def rows(self, limits: Tensor) -> list[Tensor]:
        """Of `limits` [W + 1], one `[windows, length]` for each length. Asks the device once for each batch."""
        for known, rows in self._known:
            if known is limits:
                return rows
        rows = group_by_length(limits)
        self._known = [*self._known[-1:], (limits, rows)]  # a batch has two kinds: windows, and whole frames
        return rows


def group_by_length(limits: Tensor) -> list[Tensor]:
    bounds = limits.tolist()
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(bounds):
        if end > start:
            starts.setdefault(end - start, []).append(start)
    return [
        torch.tensor(first, device=limits.device)[:, None] + torch.arange(length, device=limits.device)
        for length, first in starts.items()
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Softmax attention of rows `[S, H, d]` within each window of `groups`."""
    out = torch.empty_like(query)
    for rows in groups:  # [windows, length]
        q, k, v = (tensor[rows].transpose(1, 2) for tensor in (query, key, value))  # [windows, H, length, d]
        out = out.index_put((rows,), F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    return out


def batch_windows(vision: nn.Module, rotate: Any) -> None:
    """Let the attention blocks of Qwen's vision tower attend to all windows of a length at once.

    `rotate` is the rotary embedding of the very module that defines the tower. Called every time, the choice of
    attention may change later: whatever is not SDPA keeps its own way.
    """
    windows = Windows()
    for block in vision.blocks:  # type: ignore[union-attr]
        original = block.attn.forward

        def forward(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None,
                    *rest: Any, _original: Any = original, **options: Any) -> Any:  # fmt: skip
            if self.config._attn_implementation != "sdpa" or position_embeddings is None:
                return _original(hidden_states, cu_seqlens, position_embeddings, *rest, **options)
            shape = (len(hidden_states), 3, self.num_heads, -1)
            query, key, value = self.qkv(hidden_states).reshape(shape).unbind(1)  # [S, H, d] each
            query, key = rotate(query, key, *position_embeddings)
            found = attend(query, key, value, windows.rows(cu_seqlens))
            return self.proj(found.flatten(1))

        block.attn.forward = MethodType(forward, block.attn)
