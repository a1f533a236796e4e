"""The few bundles of tensors that travel between the row operations.

A chunk is the largest thing that is ever materialised of the anchor-by-token similarity matrix: some rows of one
sequence, for one layer or a few. Everything here is a plain view of buffers that the engine owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowChunk:
    """`R` anchor rows of one sequence against its `n` tokens, for `G` layers."""

    similarity: Tensor  # float32 [G, R, n], raw dot products
    row_scale: Tensor  # float32 [G, R], inverse norms of the anchors
    token_scale: Tensor  # float32 [G, n], inverse norms of the tokens
    temperature: Tensor  # float32 []
    own_token: Tensor  # int64 [R], the column that is the anchor itself
    exclude_own: bool
    frame_offsets: Tensor  # int64 [P + 1], columns of each frame
    values: Tensor | None  # float32 [n, V]
    known: Tensor | None  # bool [n], tokens whose values count


class FrameStatistics(NamedTuple):
    """What one pass over the tokens of a frame leaves behind, for every row. Empty frames have `lse = -inf`."""

    lse: Tensor  # float32 [G, R, P]
    known_lse: Tensor  # float32 [G, R, P], over the tokens of known value
    expected: Tensor  # float32 [G, R, P, V]
    best: Tensor  # int64 [G, R, P], column of the largest similarity, the first of equals; -1 in an empty frame
    peak: Tensor  # float32 [G, R, P], that similarity

    @staticmethod
    def nothing(groups: int, rows: int, frames: int, width: int, device: torch.device) -> FrameStatistics:
        """The statistics of frames without tokens."""
        none = torch.full((groups, rows, frames), float("-inf"), device=device)
        return FrameStatistics(
            lse=none,
            known_lse=none.clone(),
            expected=torch.zeros(groups, rows, frames, width, device=device),
            best=torch.full((groups, rows, frames), -1, device=device),
            peak=none.clone(),
        )


class FrameUpstream(NamedTuple):
    """Gradients of the loss with respect to `lse` and `expected`."""

    lse: Tensor  # float32 [G, R, P]
    expected: Tensor  # float32 [G, R, P, V]

    @staticmethod
    def zeros_like(statistics: FrameStatistics) -> FrameUpstream:
        return FrameUpstream(torch.zeros_like(statistics.lse), torch.zeros_like(statistics.expected))


@dataclass(frozen=True)
class MatchRuns:
    """The matches of the chunk's rows, sorted by (row, frame, target), as runs in the arrays of the whole batch."""

    start: Tensor  # int64 [R * longest + 1], sorted positions; row r, frame p owns [start[rL+p], start[rL+p+1])
    longest: int  # frames of the longest sequence of the batch: the stride of `start`
    order: Tensor  # int64 [M], sorted position -> match
    target: Tensor  # int64 [M], sorted: token in the batch
    depth: Tensor  # float32 [M], sorted
    counts: Tensor  # bool [M], sorted: has a depth term
    first_token: int  # token in the batch of the chunk's column 0

    def run(self, row: int, frame: int) -> range:
        at = row * self.longest + frame
        return range(int(self.start[at]), int(self.start[at + 1]))


class MatchScales(NamedTuple):
    """How much each term of each match weighs in the loss, by match (not sorted)."""

    corr: Tensor  # float32 [G, M], may be expanded
    depth: Tensor  # float32 [G, M], may be expanded


class MatchTerms(NamedTuple):
    """What a match contributes, by match (not sorted)."""

    corr: Tensor  # float32 [G, M]
    depth: Tensor  # float32 [G, M]
    best: Tensor  # int64 [G, M], token in the batch that the anchor likes best in the target's frame
    confidence: Tensor  # float32 [G, M], probability of that token within the frame

    @staticmethod
    def empty(layers: int, matches: int, device: torch.device) -> MatchTerms:
        def floats() -> Tensor:
            return torch.empty(layers, matches, dtype=torch.float32, device=device)

        best = torch.empty(layers, matches, dtype=torch.int64, device=device)
        return MatchTerms(corr=floats(), depth=floats(), best=best, confidence=floats())

    def of_layers(self, layers: slice) -> MatchTerms:
        return MatchTerms(*(value[layers] for value in self))
