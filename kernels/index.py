"""Rows and matches in the order in which the kernels read them.

Built once per batch, where the batch is made (usually in a data worker), and moved to the device as it is. Each
different anchor token becomes one row of a similarity matrix, in ascending order, so the rows of a sequence are
contiguous. Matches are sorted by (row, frame, target): the matches of one row in one frame form one contiguous run, and
every sum over matches has one fixed order.

Numbers that determine shapes and launches stay on the CPU (`spans`, `frame_ends`, `row_positions`), so no launch waits
for the device. Nothing is checked here; `gasp_fast.Matches` checks the indices first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from operator import or_
from typing import Any, TypeVar

import torch
from torch import Tensor

_CPU_FIELDS = ("spans", "frame_ends", "row_positions")  # read by the host, so never moved

IndexT = TypeVar("IndexT", bound="_Movable")


class _Movable:
    """Moves every tensor of an index except those that the host reads."""

    def to(self: IndexT, device: torch.device | str, non_blocking: bool = False) -> IndexT:
        return self.map_tensors(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: IndexT) -> IndexT:
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self: IndexT, change: Callable[[Tensor], Tensor]) -> IndexT:
        changed: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, _Movable):
                changed[name] = value.map_tensors(change)
            else:
                changed[name] = value if name in _CPU_FIELDS else change(value)
        return type(self)(**changed)


@dataclass(frozen=True)
class SequenceSpan:
    """The half-open ranges of tokens, frames and rows that one sequence covers in the batch."""

    number: int
    tokens: tuple[int, int]
    frames: tuple[int, int]
    rows: tuple[int, int]

    @property
    def token_count(self) -> int:
        return self.tokens[1] - self.tokens[0]

    @property
    def frame_count(self) -> int:
        return self.frames[1] - self.frames[0]

    @property
    def row_count(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowIndex(_Movable):
    """Which tokens are rows, and which frames each is compared with."""

    row_token: Tensor  # int64 [A], ascending, no repeats
    row_column: Tensor  # int64 [A], the same tokens, counted from the first token of their sequence
    token_row: Tensor  # int64 [N], the row of each token, counted from the first row of its sequence; -1: it has none
    other_column: Tensor  # int64 [N - A], the tokens that are no rows, counted from the first token of their sequence
    column_offsets: Tensor  # int64 [F + B], P + 1 of each sequence: its frames, counted from its first token
    spans: Tensor  # int64 [B, 3] on the CPU: end of each sequence in tokens, frames, rows
    frame_ends: Tensor  # int64 [F] on the CPU

    @staticmethod
    def build(row_token: Tensor, frame_offsets: Tensor, sequence_offsets: Tensor) -> RowIndex:
        starts, ends = frame_offsets[sequence_offsets[:-1]], frame_offsets[sequence_offsets[1:]]  # [B], tokens
        of_row = torch.searchsorted(ends, row_token, right=True)  # [A], sequence
        row_ends = torch.searchsorted(row_token, ends)  # [B]
        number = torch.arange(len(row_token), device=row_token.device)  # [A]
        token_row = torch.full((int(frame_offsets[-1]),), -1, device=row_token.device)
        token_row[row_token] = number - torch.cat([row_ends.new_zeros(1), row_ends])[of_row]
        others = (token_row < 0).nonzero().squeeze(1)
        sequence_frames = sequence_offsets.tolist()
        columns = [
            frame_offsets[first : last + 1] - frame_offsets[first]
            for first, last in itertools.pairwise(sequence_frames)
        ]
        return RowIndex(
            row_token=row_token,
            row_column=row_token - starts[of_row],
            token_row=token_row,
            other_column=others - starts[torch.searchsorted(ends, others, right=True)],
            column_offsets=torch.cat(columns),
            spans=torch.stack([ends, sequence_offsets[1:], row_ends], dim=1).cpu(),
            frame_ends=frame_offsets[1:].cpu(),
        )

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order: the form in which an index is passed to a PyTorch operator."""
        return [getattr(self, name) for name in _ROW_FIELDS]

    @staticmethod
    def from_tensors(tensors: list[Tensor]) -> RowIndex:
        return RowIndex(**dict(zip(_ROW_FIELDS, tensors, strict=True)))

    @cached_property
    def longest(self) -> int:
        """P, the frames of the longest sequence."""
        return max(span.frame_count for span in self.sequences)

    @cached_property
    def sequences(self) -> tuple[SequenceSpan, ...]:
        starts = [[0, 0, 0], *self.spans.tolist()]
        return tuple(
            SequenceSpan(number, *zip(start, end, strict=True))
            for number, (start, end) in enumerate(itertools.pairwise(starts))
        )

    @cached_property
    def frame_multiple(self) -> int:
        """The ends of all frames, or-ed: a power of two divides it if it divides every end."""
        return reduce(or_, self.frame_ends.tolist(), 0)

    def frame_columns(self, sequence: SequenceSpan) -> Tensor:
        """int64 [P + 1]: the columns of each frame of a sequence."""
        if len(self.sequences) == 1:
            return self.column_offsets
        first = sequence.frames[0] + sequence.number
        return self.column_offsets[first : first + sequence.frame_count + 1]

    @cached_property
    def in_sequence(self) -> Tensor:
        """bool [B, N]: which tokens each sequence has."""
        inside = self.token_row.new_zeros(len(self.sequences), self.token_row.shape[0], dtype=torch.bool)
        for sequence in self.sequences:
            inside[sequence.number, slice(*sequence.tokens)] = True
        return inside

    def rows_of(self, sequence: SequenceSpan) -> Tensor:
        """int64 [n]: the row of each token of a sequence, counted from its first row; -1: it has none."""
        return self.token_row if len(self.sequences) == 1 else self.token_row[slice(*sequence.tokens)]

    def other_columns(self, sequence: SequenceSpan) -> Tensor:
        """int64 [n - A]: the columns of a sequence that are no rows."""
        if len(self.sequences) == 1:
            return self.other_column
        first = sequence.tokens[0] - sequence.rows[0]
        return self.other_column[first : first + sequence.token_count - sequence.row_count]


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchIndex(_Movable):
    """The rows of a batch, and the sorted matches of each row."""

    rows: RowIndex
    run_start: Tensor  # int64 [A * P + 1], matches of row a in its p-th frame: [run_start[aP+p], run_start[aP+p+1])
    row_positions: Tensor  # int64 [A + 1] on the CPU: the matches of row a are [row_positions[a], row_positions[a + 1])
    order: Tensor  # int64 [M], sorted position -> match
    row: Tensor  # int64 [M], sorted: its row
    target: Tensor  # int64 [M], sorted: its target token
    depth: Tensor  # float32 [M], sorted: its target depth, 0 where it has no depth term
    has_depth: Tensor  # bool [M], sorted: has a depth term
    weight: Tensor  # floating [M], or [1] where all are equal; by match (not sorted): its weight in means and sums
    depth_total: Tensor  # float64 [], of the matches that have a depth term; 1 where they have no weight
    corr_share: Tensor  # float64, like `weight`, divided by that of all matches
    depth_share: Tensor  # float64, like `weight`, divided by `depth_total`
    values: Tensor  # float32 [N, 1], patch depth, 0 where unknown
    known: Tensor  # float32 [N], 1 where the patch depth is known, else 0

    @staticmethod
    def build(
        frame_offsets: Tensor,
        sequence_offsets: Tensor,
        anchor: Tensor,
        target: Tensor,
        target_depth: Tensor | None,
        countable: Tensor,  # bool [M], matches whose own depth is fit for the depth term
        patch_depth: Tensor | None,
        known: Tensor,  # bool [N]
        weight: Tensor | None,  # floating [M]
    ) -> MatchIndex:
        target_frame = torch.searchsorted(frame_offsets[1:].contiguous(), target, right=True)
        sequence = torch.searchsorted(sequence_offsets[1:].contiguous(), target_frame, right=True)
        row_token, row = torch.unique(anchor, return_inverse=True)
        rows = RowIndex.build(row_token, frame_offsets, sequence_offsets)
        cell = row * rows.longest + target_frame - sequence_offsets[sequence]
        order = _argsort(row, target)
        runs = torch.bincount(cell, minlength=len(row_token) * rows.longest)
        run_start = torch.cat([runs.new_zeros(1), runs.cumsum(0)])
        has_depth = countable & _frames_with(known, frame_offsets)[target_frame]
        weight = torch.ones(1, device=anchor.device) if weight is None else weight
        each = weight.double().expand(anchor.shape)  # [M]
        depth_total = _positive_or_one(torch.where(has_depth, each, 0).sum())
        return MatchIndex(
            rows=rows,
            run_start=run_start,
            row_positions=run_start[:: rows.longest].cpu(),
            order=order,
            row=row[order],
            target=target[order],
            depth=_zero_unless(has_depth, target_depth)[order],
            has_depth=has_depth[order],
            weight=weight,
            depth_total=depth_total,
            corr_share=weight.double() / _positive_or_one(each.sum()),
            depth_share=weight.double() / depth_total,
            values=_zero_unless(known, patch_depth)[:, None],
            known=known.float(),
        )

    @cached_property
    def row_ends(self) -> list[int]:
        """`row_positions` as Python numbers."""
        return self.row_positions.tolist()

    @cached_property
    def sequence_shares(self) -> Tensor:
        """float32 [B]: the sum of `corr_share` over the matches of each sequence."""
        shares = self.corr_share.expand(self.order.shape)[self.order].float()  # those of a sequence one after another
        ends = [(self.row_ends[sequence.rows[0]], self.row_ends[sequence.rows[1]]) for sequence in self.rows.sequences]
        return torch.stack([shares[first:end].sum() for first, end in ends])

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, those of `rows` first."""
        return self.rows.tensors() + [getattr(self, name) for name in _MATCH_FIELDS]

    @staticmethod
    def from_tensors(tensors: list[Tensor]) -> MatchIndex:
        split = len(tensors) - len(_MATCH_FIELDS)
        rows = RowIndex.from_tensors(tensors[:split])
        return MatchIndex(rows=rows, **dict(zip(_MATCH_FIELDS, tensors[split:], strict=True)))


_ROW_FIELDS = [f.name for f in fields(RowIndex)]
_MATCH_FIELDS = [f.name for f in fields(MatchIndex) if f.name != "rows"]


def _argsort(major: Tensor, minor: Tensor) -> Tensor:
    """Stable order by (major, minor)."""
    order = torch.argsort(minor, stable=True)
    return order[torch.argsort(major[order], stable=True)]


def _frames_with(known: Tensor, frame_offsets: Tensor) -> Tensor:
    """Bool [F]: frames with at least one known token."""
    seen = torch.cat([torch.zeros(1, dtype=torch.long, device=known.device), known.long().cumsum(0)])
    return seen[frame_offsets[1:]] > seen[frame_offsets[:-1]]


def _zero_unless(mask: Tensor, depth: Tensor | None) -> Tensor:
    """`depth` in float32 where `mask` is set, else 0."""
    if depth is None:
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return torch.where(mask, depth, 0).float()


def _positive_or_one(total: Tensor) -> Tensor:
    """A sum to divide by."""
    return torch.where(total > 0, total, 1)
