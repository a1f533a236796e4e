"""Where the tokens of a pack lie in memory, and their positions.

A pack is B sequences of the same shape. Each sequence is

    prefix    text, may be empty
    block     for each frame: a start token, one token a patch, an end token
    tail      ViT tokens, question and answer; may be empty, padded on the right

DINO's patches are geometric tokens, all others semantic. In memory the tokens lie in another order,

    patches | starts and ends | prefix | tail
    geometric | semantic ...................

so that each expert computes a slice, and the queries and keys of each part of the attention (`attention`) are slices,
too. Nothing is permuted back: attention depends on order through masks and rotary positions alone, and both are known.

Positions are those of Qwen2-VL: time, row and column, of which text advances all three by one. With a frame's start
token at p, the patch in row r and column c is at (p + 1, p + 1 + r, p + 1 + c) and the end token at
p + 1 + max(rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """Number of tokens of each kind in a sequence."""

    frames: int = 0
    rows: int = 0  # of patches in a frame
    columns: int = 0
    prefix: int = 0
    tail: int = 0

    @property
    def patches(self) -> int:
        """Of all frames: the geometric tokens."""
        return self.frames * self.rows * self.columns

    @property
    def marks(self) -> int:
        """Start and end tokens of all frames."""
        return 2 * self.frames

    @property
    def block(self) -> int:
        return self.patches + self.marks

    @property
    def context(self) -> int:
        """Prefix and block: what every token of the tail sees."""
        return self.block + self.prefix

    @property
    def total(self) -> int:
        return self.context + self.tail

    @property
    def frame_extent(self) -> int:
        """Positions from one frame's start token to the next one's."""
        return 2 + max(self.rows, self.columns)

    @property
    def tail_position(self) -> int:
        """Position of the first token of the tail."""
        return self.prefix + self.frames * self.frame_extent


def context_positions(arrangement: Arrangement, device: torch.device | None = None) -> Tensor:
    """Positions of patches, starts and ends, and prefix, in this order: int64 [3, context]."""
    of_prefix = torch.arange(arrangement.prefix, device=device).expand(3, -1)
    start = arrangement.prefix + arrangement.frame_extent * torch.arange(arrangement.frames, device=device)  # [F]
    marks = torch.stack([start, start + arrangement.frame_extent - 1], -1).flatten().expand(3, -1)  # [3, 2 F]
    time = (start + 1).view(-1, 1, 1).expand(-1, arrangement.rows, arrangement.columns)  # [F, rows, columns]
    row = time + torch.arange(arrangement.rows, device=device)[:, None]
    column = time + torch.arange(arrangement.columns, device=device)
    patches = torch.stack([time, row, column]).flatten(1)  # [3, F rows columns]
    return torch.cat([patches, marks, of_prefix], 1)


def text_positions(input_ids: Tensor, image_token: int, grids: Tensor | None = None, merge: int = 2) -> Tensor:
    """Positions of text and ViT tokens, from 0: int64 [B, S], grids [images, (1, rows, columns)] -> [3, B, S].

    `grids` counts ViT patches, of which `merge` x `merge` become one token. The result is that of `get_rope_index` of
    transformers' Qwen2-VL, but the host does not wait for the GPU. Padding counts as text.
    """
    is_image = input_ids == image_token  # [B, S]
    if grids is None or not len(grids):
        return _before(torch.ones_like(input_ids)).expand(3, -1, -1)
    rows, columns = (grids[:, 1:].to(input_ids.device) // merge).unbind(1)  # [images]
    ends = (rows * columns).cumsum(0)
    number = _before(is_image.long().flatten()).view_as(input_ids)  # of image tokens before each token of the pack
    image = torch.searchsorted(ends, number, right=True).clamp(max=len(ends) - 1)  # [B, S]
    place = number - (ends - rows * columns)[image]  # of a token in its image
    is_last = number + 1 == ends[image]
    extent = torch.maximum(rows, columns)[image] * is_last  # only the last token of an image advances, past all of it
    start = _before(torch.where(is_image, extent, 1))
    row = torch.where(is_image, place // columns[image], 0)
    column = torch.where(is_image, place % columns[image], 0)
    return torch.stack([start, start + row, start + column])


def _before(values: Tensor) -> Tensor:
    """The sum of the values before each one, along the last dimension."""
    return values.cumsum(-1) - values
