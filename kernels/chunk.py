"""Inputs and outputs of engines and row operations: a problem, a chunk of its similarities, matches, and results.

A chunk is the largest part of the anchor-by-token similarity matrix that is ever in memory: some rows of one sequence,
for one layer or a few. Sizes of a batch: `L` layers, `A` rows, `N` tokens, `M` matches, `P` frames of its longest
sequence, `V` values per token. Sizes of a chunk: `G` layers, `R` rows, `n` tokens, `P` frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .index import MatchIndex, RowIndex


@dataclass(frozen=True)
class Problem:
    """Each row of a batch is compared with all tokens of its sequence, in `L` layers."""

    embeddings: Tensor  # [L, N, D]
    rows: RowIndex
    temperature: Tensor  # float32 []
    values: Tensor | None  # float32 [N, V]
    known: Tensor | None  # bool [N], tokens whose values count
    exclude_own: bool  # leave a row's own token out of its frame

    @staticmethod
    def of_loss(embeddings: Tensor, index: MatchIndex, temperature: Tensor) -> Problem:
        return Problem(embeddings, index.rows, temperature, index.values, index.known, exclude_own=True)


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
    """Results of one pass over the tokens of each frame, for every row. Empty frames have `lse = -inf`."""

    lse: Tensor  # float32 [G, R, P]
    known_lse: Tensor  # float32 [G, R, P], over the tokens of known value
    expected: Tensor  # float32 [G, R, P, V]
    best: Tensor  # int64 [G, R, P], column of the largest similarity, the first of equals; -1 in an empty frame
    peak: Tensor  # float32 [G, R, P], that similarity

    @staticmethod
    def of_empty_frames(groups: int, rows: int, frames: int, width: int, device: torch.device) -> FrameStatistics:
        minus_infinity = torch.full((groups, rows, frames), float("-inf"), device=device)
        return FrameStatistics(
            lse=minus_infinity,
            known_lse=minus_infinity.clone(),
            expected=torch.zeros(groups, rows, frames, width, device=device),
            best=torch.full((groups, rows, frames), -1, device=device),
            peak=minus_infinity.clone(),
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

    start: Tensor  # int64 [R * longest + 1], row r has in frame p the sorted positions from start[r * longest + p] on
    longest: int  # frames of the longest sequence of the batch: the stride of `start`
    order: Tensor  # int64 [M], sorted position -> match
    target: Tensor  # int64 [M], sorted: token in the batch
    depth: Tensor  # float32 [M], sorted
    has_depth: Tensor  # bool [M], sorted: has a depth term
    first_token: int  # token in the batch of the chunk's column 0

    @staticmethod
    def of(index: MatchIndex, rows: slice = slice(None), first_token: int = 0) -> MatchRuns:
        """The runs of some rows of the batch, or of all."""
        longest, (start, stop, _) = index.rows.longest, rows.indices(index.rows.row_token.shape[0])
        return MatchRuns(
            start=index.run_start[start * longest : stop * longest + 1],
            longest=longest,
            order=index.order,
            target=index.target,
            depth=index.depth,
            has_depth=index.has_depth,
            first_token=first_token,
        )

    def run(self, row: int, frame: int) -> range:
        at = row * self.longest + frame
        return range(int(self.start[at]), int(self.start[at + 1]))


class TermWeights(NamedTuple):
    """The weight of each term of each match in the loss, by match (not sorted): `loss = sum weight * term`."""

    corr: Tensor  # float32 [G, M], may be expanded
    depth: Tensor  # float32 [G, M], may be expanded

    def of_layers(self, layers: slice) -> TermWeights:
        return TermWeights(self.corr[layers], self.depth[layers])


class MatchTerms(NamedTuple):
    """Both loss terms of each match, and what the metrics need, by match (not sorted)."""

    corr: Tensor  # float32 [G, M]
    depth: Tensor  # float32 [G, M]
    best: Tensor  # int64 [G, M], most similar token of the target's frame, as token in the batch
    confidence: Tensor  # float32 [G, M], probability of that token within the frame

    @staticmethod
    def empty(layers: int, matches: int, device: torch.device) -> MatchTerms:
        def floats() -> Tensor:
            return torch.empty(layers, matches, dtype=torch.float32, device=device)

        best = torch.empty(layers, matches, dtype=torch.int64, device=device)
        return MatchTerms(corr=floats(), depth=floats(), best=best, confidence=floats())

    def of_layers(self, layers: slice) -> MatchTerms:
        return MatchTerms(*(value[layers] for value in self))


class RowOperations(Protocol):
    """The passes over a chunk between the matrix products. `rows_torch` defines what each computes."""

    def inverse_norms(self, embeddings: Tensor) -> Tensor: ...

    def frame_statistics(self, chunk: RowChunk, runs: MatchRuns | None, every_frame: bool) -> FrameStatistics: ...

    def loss_terms(
        self,
        chunk: RowChunk,
        statistics: FrameStatistics,
        runs: MatchRuns,
        weights: TermWeights | None,
        terms: MatchTerms,
        negatives: str,
        eps: float,
    ) -> FrameUpstream | None: ...

    def similarity_gradient(
        self,
        chunk: RowChunk,
        statistics: FrameStatistics,
        upstream: FrameUpstream,
        runs: MatchRuns | None,
        weights: TermWeights | None,
        out: Tensor,
    ) -> None: ...

    def project_gradient(self, gradient: Tensor, embeddings: Tensor, inverse_norm: Tensor, out: Tensor) -> None: ...


# `frame_statistics`, `loss_terms` and `similarity_gradient` (into the last argument) in one launch. Returns False, and
# does nothing, where the chunk does not fit it.
FusedPass = Callable[
    [RowChunk, MatchRuns, TermWeights | None, MatchTerms, str, float, Tensor | None],
    bool,
]
