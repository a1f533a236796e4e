"""Inputs and outputs of engines and row operations: a problem, a chunk of its similarities, matches, and results.

A chunk is the largest part of the anchor-by-candidate similarity matrix that is ever in memory: some rows of one
sequence against all or some of its tokens, for one layer or a few. Sizes of a batch: `L` layers, `A` rows, `N` tokens,
`M` matches, `P` frames of its longest sequence, `V` values per token. Sizes of a chunk: `G` layers, `R` rows, `n`
tokens, `P` frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .index import MatchIndex, RowIndex


@dataclass(frozen=True)
class Problem:
    """Each row of a batch is compared with all tokens of its sequence, in `L` layers."""

    embeddings: Tensor  # [L, N, D], the anchors are rows of it
    keys: Tensor  # [L, N, D], the candidates; `embeddings` itself where both are the same
    rows: RowIndex
    temperature: Tensor  # float32 []
    values: Tensor | None  # float32 [N, V], 0 where they do not count
    known: Tensor | None  # float32 [N], 1 where the values of a token count, else 0; None where `values` is None
    exclude_own: bool  # leave a row's own token out of its frame
    duals: Tensor | None = None  # [L, N, D], where `embeddings_i . duals_k` is the inner product; see `chunked`


@dataclass  # not frozen: one is made for every chunk, and a frozen one takes the host several times as long
class RowChunk:
    """`R` anchor rows of one sequence against `n` of its tokens, for `G` layers."""

    similarity: Tensor  # float32 [G, R, n], raw dot products; row operations may overwrite them
    row_scale: Tensor  # float32 [G, R], inverse norms of the anchors
    token_scale: Tensor  # float32 [G, n], inverse norms of the tokens
    temperature: Tensor  # float32 []
    row_token: Tensor  # int64 [R], token of the batch that is the anchor itself; it may lie in another chunk
    exclude_own: bool
    first_token: int  # token of the batch that is column 0
    frame_offsets: Tensor  # int64 [P + 1], all frames of the sequence; what lies in other chunks is left out
    first_column: int  # column 0, counted as `frame_offsets` are: from the first token of the sequence
    values: Tensor | None  # float32 [n, V], 0 where they do not count
    known: Tensor | None  # float32 [n], 1 where the values of a token count, else 0
    multiple: int = 1  # divides the first column and the size of each frame: kernels load so many numbers at once
    launches: Any = field(default=None, init=False, repr=False)  # what `rows_triton` computes once for all its launches


class FrameStatistics(NamedTuple):
    """Results of one pass over the tokens of each frame, for every row. Empty frames have `lse = -inf`."""

    lse: Tensor  # float32 [G, R, P]
    known_lse: Tensor  # float32 [G, R, P], over the tokens of known value
    expected: Tensor  # float32 [G, R, P, V]
    best: Tensor  # int64 [G, R, P], token of the batch with the largest similarity, the first of equals; -1 if empty
    peak: Tensor  # float32 [G, R, P], that similarity
    negative_lse: Tensor  # float32 [G, R, P], without the row's targets where these are ignored; else `lse` itself

    @staticmethod
    def of_empty_frames(
        groups: int, rows: int, frames: int, width: int, device: torch.device, ignored: bool = False
    ) -> FrameStatistics:
        lse = torch.full((groups, rows, frames), float("-inf"), device=device)
        return FrameStatistics(
            lse=lse,
            known_lse=lse.clone(),
            expected=torch.zeros(groups, rows, frames, width, device=device),
            best=torch.full((groups, rows, frames), -1, device=device),
            peak=lse.clone(),
            negative_lse=lse.clone() if ignored else lse,
        )

    @staticmethod
    def of(statistics: Iterable[Tensor]) -> FrameStatistics:
        """From the first five; `negative_lse` is `lse`."""
        lse, known_lse, expected, best, peak = statistics
        return FrameStatistics(lse, known_lse, expected, best, peak, negative_lse=lse)


class FrameUpstream(NamedTuple):
    """Gradients of the loss with respect to statistics."""

    lse: Tensor  # float32 [G, R, P], of `negative_lse` (of `lse`, where that is the same)
    expected: Tensor  # float32 [G, R, P, V]


@dataclass
class PartMemory:
    """Where row operations may put their results for rows of one size, instead of allocating memory every time."""

    statistics: FrameStatistics | None = None
    upstream: FrameUpstream | None = None


@dataclass(frozen=True)
class TermDefinition:
    """What the two terms of a match are. `loss.naive` defines each option."""

    negatives: str  # "sequence" | "frame"
    other_targets: str  # "negatives" | "ignored"
    eps: float

    @property
    def every_frame(self) -> bool:
        """Whether a row needs the statistics of frames in which it has no match."""
        return self.negatives == "sequence"

    @property
    def ignores_targets(self) -> bool:
        return self.other_targets == "ignored"


@dataclass  # not frozen: one is made for every chunk, and a frozen one takes the host several times as long
class ChunkMatches:
    """The matches of the chunk's rows, sorted by (row, frame, target), as runs in the arrays of the whole batch."""

    start: Tensor  # int64 [R * longest + 1], row r has in frame p the sorted positions from start[r * longest + p] on
    longest: int  # frames of the longest sequence of the batch: the stride of `start`
    first_row: int  # row of the batch that is the chunk's row 0
    order: Tensor  # int64 [M], sorted position -> match
    row: Tensor  # int64 [M], sorted: row of the batch
    target: Tensor  # int64 [M], sorted: token of the batch
    depth: Tensor  # float32 [M], sorted
    has_depth: Tensor  # bool [M], sorted: has a depth term
    positive: Tensor  # float32 [G, M], sorted: similarity of each match, written by `frame_statistics`
    pull: Tensor | None  # float32 [G, M], sorted: gradient of that similarity, written by `loss_terms` with weights
    definition: TermDefinition

    @staticmethod
    def of(
        index: MatchIndex, rows: slice, positive: Tensor, pull: Tensor | None, definition: TermDefinition
    ) -> ChunkMatches:
        longest, run_start = index.rows.longest, index.run_start
        if rows.start > 0 or rows.stop < index.row_positions.shape[0] - 1:
            run_start = run_start[rows.start * longest : rows.stop * longest + 1]
        return ChunkMatches(  # by position: by name it takes the host three times as long
            run_start, longest, rows.start, index.order, index.row, index.target, index.depth, index.has_depth,
            positive, pull, definition,
        )  # fmt: skip

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


class AddedRows(NamedTuple):
    """Gradients of the tokens that are rows, to be added to what these tokens receive as candidates."""

    rows: Tensor  # float32 [G, R, D]
    of_token: Tensor  # int64 [n], the row of each token
    first_row: int  # which of these rows is `rows[:, 0]`; a token of an earlier row, or of none (-1), gets nothing


class RowOperations(Protocol):
    """The passes over a chunk between the matrix products. `rows_torch` defines what each computes."""

    def inverse_norms(self, embeddings: Tensor, duals: Tensor | None = None) -> Tensor: ...

    def norms_and_rows(
        self,
        tokens: Tensor,
        duals: Tensor | None,
        own: Tensor,
        row_of: Tensor,
        norms: Tensor,
        of_rows: Tensor,
        anchors: Tensor | None,
    ) -> None: ...

    def frame_statistics(
        self,
        chunk: RowChunk,
        matches: ChunkMatches | None,
        previous: FrameStatistics | None,
        memory: PartMemory | None = None,
    ) -> FrameStatistics: ...

    def loss_terms(
        self,
        statistics: FrameStatistics,
        matches: ChunkMatches,
        weights: TermWeights | None,
        terms: MatchTerms,
        memory: PartMemory | None = None,
    ) -> FrameUpstream | None: ...

    def similarity_gradient(
        self,
        chunk: RowChunk,
        statistics: FrameStatistics,
        upstream: FrameUpstream,
        matches: ChunkMatches | None,
        out: Tensor,
    ) -> None: ...

    def fold(self, x: Tensor, own: Tensor, row_of: Tensor, others: Tensor, rest: Tensor) -> None: ...

    def gather_rows(self, source: Tensor, index: Tensor, out: Tensor) -> None: ...

    def add_rows(self, rows: Tensor, columns: Tensor, out: Tensor) -> None: ...

    def project_gradient(
        self,
        gradient: Tensor,
        embeddings: Tensor,
        inverse_norm: Tensor,
        out: Tensor,
        of_unit: bool,
        factor: Tensor | None = None,
        added: AddedRows | None = None,
        tokens: Tensor | None = None,
        duals: Tensor | None = None,
    ) -> None: ...
