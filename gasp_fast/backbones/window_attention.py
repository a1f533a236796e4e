"""Attention of Qwen's vision tower: one SDPA call for all windows of equal length, on views of one tensor.

transformers calls SDPA once per window: some 27,000 calls for 24 frames of 896x504 pixels, each too small to use a GPU
or a CPU well. But there are only a few window lengths: whole windows, and those cut by the right edge, by the lower
edge, by both. Windows of one length form a batch. FlashAttention takes windows of any lengths in one call, but around
it transformers' tower reads their boundaries from the device and rotates queries and keys in fp32 copies, so it is
replaced as well.

The tower reorders its rows at its entry anyway, window after window, and undoes this at its end. `PatchOrder` is such
an order in which, besides, all windows of one length are consecutive, over all frames. The batch of a length is then a
view of the rows, without gather and scatter. The few layers that attend to whole frames gather their rows frame by
frame; where all windows have one length, rows lie frame by frame already. Every query sees the same keys as before;
only the number of calls falls.

The order follows from the sizes of the frames, which are read once a call of the tower. `PatchOrders` computes it on
the host and passes it to the tower in the keyword arguments in which transformers takes a precomputed order. The tower
hands unknown keyword arguments on to its attention: so every `BatchedWindowAttention` receives the `PatchOrder`. It is
a module in the place of transformers', because a function registered with `AttentionInterface` is called once a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .vision_layers import rotate

Runs = list[tuple[int, int]]  # (number, length) of windows or frames of equal length, in the order of the rows
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PatchOrder:
    """An order of the S patches of a batch of frames in which windows of equal length are consecutive.

    The processor's order is frame by frame, and within a frame by token, which is a block of m x m patches.
    """

    tokens: Tensor  # int64 [S / m^2], the processor's number of each token in this order
    positions: Tensor  # int64 [S, 2], row and column of each patch, in the processor's order
    windows: Runs
    frames: Runs
    by_frame: Tensor | None  # int64 [S], the rows of this order frame by frame; None: they are so already
    from_frames: Tensor | None  # its inverse

    @staticmethod
    def of(grid: Sequence[Sequence[int]], merge: int, window: int, device: torch.device) -> PatchOrder:
        """Of frames of `grid` [(times, rows, columns)] patches; a `window` has as many rows and columns of tokens."""
        sizes = [(rows // merge, columns // merge) for times, rows, columns in grid for _ in range(times)]
        area = np.array([rows * columns for rows, columns in sizes])  # [frames], in tokens
        first = np.cumsum(area) - area
        ordered = [window_order(*size, window) for size in sizes]
        tokens = np.concatenate([start + order for start, (order, _) in zip(first, ordered, strict=True)])
        length = np.concatenate([lengths for _, lengths in ordered])  # of each token's window
        frame = np.repeat(np.arange(len(sizes)), area)
        by_length = np.argsort(-length, kind="stable")
        tokens, length, frame = tokens[by_length], length[by_length], frame[by_length]

        by_frame = np.lexsort((frame, -area[frame]))
        in_frames = np.array_equal(by_frame, np.arange(len(frame)))
        patches = (by_frame[:, None] * merge**2 + np.arange(merge**2)).ravel()
        positions = np.concatenate([patch_positions(*size, merge) for size in sizes])
        return PatchOrder(
            tokens=on_device(tokens, device),
            positions=on_device(positions, device),
            windows=runs_of(length, merge**2),
            frames=runs_of(area[frame], merge**2),
            by_frame=None if in_frames else on_device(patches, device),
            from_frames=None if in_frames else on_device(np.argsort(patches), device),
        )


@lru_cache(maxsize=64)
def window_order(rows: int, columns: int, window: int) -> tuple[Integers, Integers]:
    """The tokens of a frame window by window, and the number of tokens in the window of each: `[rows * columns]`."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    down, across = row // window, column // window
    length = np.minimum(window, rows - down * window) * np.minimum(window, columns - across * window)
    order = np.argsort(down * columns + across, kind="stable")
    return order, length[order]


@lru_cache(maxsize=64)
def patch_positions(rows: int, columns: int, merge: int) -> Integers:
    """Row and column of the patches of a frame of `rows x columns` tokens, `[rows * columns * merge^2, 2]`."""
    row, column, inner_row, inner_column = np.indices((rows, columns, merge, merge))
    return np.stack([row * merge + inner_row, column * merge + inner_column], axis=-1).reshape(-1, 2)


def runs_of(length: Integers, scale: int) -> Runs:
    """The runs of windows, or frames, that contain each token, from the length of each, descending. In patches."""
    lengths, counts = np.unique(-length, return_counts=True)
    return [(int(count) // -int(size), -int(size) * scale) for size, count in zip(lengths, counts, strict=True)]


def on_device(values: Integers, device: torch.device) -> Tensor:
    """From pinned memory, so that the host does not wait for the device."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class PatchOrders:
    """A forward pre-hook of the tower that passes it the `PatchOrder` of its frames."""

    def __init__(self, vision: Any) -> None:
        self.merge = vision.spatial_merge_size
        self.window = vision.window_size // vision.spatial_merge_size // vision.patch_size  # in tokens
        self.last: tuple[Any, PatchOrder] | None = None  # micro-batches often have frames of the same sizes

    def __call__(self, vision: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        names = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | options
        grid = tuple(map(tuple, names["grid_thw"].tolist()))  # the one time that the host waits for the device
        device = names["hidden_states"].device
        if self.last is None or self.last[0] != (grid, device):
            self.last = (grid, device), PatchOrder.of(grid, self.merge, self.window, device)
        order = self.last[1]
        computed = {
            "position_ids": order.positions,
            "window_index": order.tokens,
            "cu_window_seqlens": boundaries(order.windows),
            "cu_seqlens": boundaries(order.frames),  # of rows taken frame by frame
            "max_window_seqlen": order.windows[0][1],
            "max_seqlen": order.frames[0][1],
        }
        return args, options | computed | {"patch_order": order}


def boundaries(runs: Runs) -> Tensor:
    """int32 [windows + 1], as transformers describes windows. Stays on the CPU: `BatchedWindowAttention` reads none."""
    lengths = [0] + [length for count, length in runs for _ in range(count)]
    return torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, runs: Runs) -> Tensor:
    """Softmax attention of rows `[S, H, d]` within each window of `runs`."""
    attended, start = [], 0
    for count, length in runs:
        rows = slice(start, start + count * length)
        start += count * length
        batch = [part[rows].unflatten(0, (count, length)).transpose(1, 2) for part in (query, key, value)]
        out = F.scaled_dot_product_attention(*batch)  # [count, H, length, d]
        attended.append(out.transpose(1, 2).flatten(0, 1))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


class BatchedWindowAttention(nn.Module):
    """Replaces `Qwen2_5_VLVisionAttention` and uses its projections, under the same parameter names."""

    def __init__(self, original: Any, whole_frames: bool) -> None:
        super().__init__()
        self.qkv, self.proj = original.qkv, original.proj
        self.num_heads = original.num_heads
        self.whole_frames = whole_frames

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        patch_order: PatchOrder,
        **options: Any,  # for other kinds of attention
    ) -> Tensor:
        """`hidden_states [S, D]` in `patch_order` -> `[S, D]`."""
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # [S, 3, H, d]
        query, key, value = rotate(qkv, *position_embeddings)  # [S, H, d] each
        if not self.whole_frames:
            attended = attend(query, key, value, patch_order.windows)
        elif patch_order.by_frame is None:
            attended = attend(query, key, value, patch_order.frames)
        else:
            rows = patch_order.by_frame
            attended = attend(query[rows], key[rows], value[rows], patch_order.frames)[patch_order.from_frames]
        return self.proj(attended.flatten(1))


def batch_windows(vision: Any) -> None:
    """Use `BatchedWindowAttention` in the blocks of Qwen's vision tower, unless its attention is eager."""
    if vision.config._attn_implementation == "eager":  # the field where transformers keeps the choice
        return
    for layer, block in enumerate(vision.blocks):
        block.attn = BatchedWindowAttention(block.attn, layer in vision.fullatt_block_indexes)
    vision.register_forward_pre_hook(PatchOrders(vision), with_kwargs=True)
