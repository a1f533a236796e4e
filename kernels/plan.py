"""The order in which the kernels walk tokens, rows and matches.

Built once per batch, wherever that was made (in a data worker, as a rule), and then only moved. Anchors become the
rows of a similarity matrix: each anchor once, ascending, so that the rows of a sequence are neighbours. Matches are
sorted by (row, frame, target): what concerns one row and one frame is one contiguous run, and every sum over matches
has one fixed order.

Numbers that decide about shapes and launches are kept on the CPU (`spans`, `frame_ends`): the device is never asked.
This page knows index tensors only, and trusts them; `gasp_fast.Matches` checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

_HOST_FIELDS = ("spans", "frame_ends")  # what the host reads stays with the host

PlanT = TypeVar("PlanT", bound="_Movable")


class _Movable:
    """Moves every tensor of a plan but those that the host reads."""

    def to(self: PlanT, device: torch.device | str, non_blocking: bool = False) -> PlanT:
        return self.mapped(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: PlanT) -> PlanT:
        return self.mapped(Tensor.pin_memory)

    def mapped(self: PlanT, change: Callable[[Tensor], Tensor]) -> PlanT:
        moved: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, _Movable):
                moved[name] = value.mapped(change)
            else:
                moved[name] = value if value is None or name in _HOST_FIELDS else change(value)
        return type(self)(**moved)


@dataclass(frozen=True)
class SequenceSpan:
    """Where one sequence lies in the batch: half-open ranges of tokens, frames and rows."""

    tokens: tuple[int, int]
    frames: tuple[int, int]
    rows: tuple[int, int]

    @property
    def token_count(self) -> int:
        return self.tokens[1] - self.tokens[0]

    @property
    def frame_count(self) -> int:
        return self.frames[1] - self.frames[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan(_Movable):
    """Which tokens are rows, and against which frames they stand."""

    row_token: Tensor  # int64 [A], ascending, no repeats
    frame_offsets: Tensor  # int64 [F + 1]
    spans: Tensor  # int64 [B, 3] on the CPU: end of each sequence in tokens, frames, rows
    frame_ends: Tensor  # int64 [F] on the CPU

    @staticmethod
    def build(row_token: Tensor, frame_offsets: Tensor, sequence_offsets: Tensor) -> RowPlan:
        sequence_tokens = frame_offsets[sequence_offsets[1:]]
        sequence_rows = torch.searchsorted(row_token, sequence_tokens)
        return RowPlan(
            row_token=row_token,
            frame_offsets=frame_offsets,
            spans=torch.stack([sequence_tokens, sequence_offsets[1:], sequence_rows], dim=1).cpu(),
            frame_ends=frame_offsets[1:].cpu(),
        )

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order: how a plan passes through an operator's signature."""
        return [getattr(self, name) for name in _ROW_FIELDS]

    @staticmethod
    def from_tensors(tensors: list[Tensor]) -> RowPlan:
        return RowPlan(**dict(zip(_ROW_FIELDS, tensors, strict=True)))

    @property
    def longest(self) -> int:
        """P, the frames of the longest sequence."""
        return max(span.frame_count for span in self.sequences())

    def sequences(self) -> Iterator[SequenceSpan]:
        token = frame = row = 0
        for next_token, next_frame, next_row in self.spans.tolist():
            yield SequenceSpan((token, next_token), (frame, next_frame), (row, next_row))
            token, frame, row = next_token, next_frame, next_row


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchPlan(_Movable):
    """Rows, and the sorted matches of each."""

    rows: RowPlan
    run_start: Tensor  # int64 [A * P + 1], matches of row a in its p-th frame: [run_start[aP+p], run_start[aP+p+1])
    order: Tensor  # int64 [M], sorted position -> match
    row: Tensor  # int64 [M], sorted: its row
    target: Tensor  # int64 [M], sorted: its target token
    depth: Tensor  # float32 [M], sorted: its target depth, 0 where it does not count
    counts: Tensor  # bool [M], sorted: counts in the depth term
    by_target: Tensor  # int64 [M], sorted positions in the order of their target tokens
    depth_count: Tensor  # float32 [], matches that count in the depth term, at least 1
    values: Tensor  # float32 [N, 1], patch depth, 0 where unknown
    known: Tensor  # bool [N]

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
    ) -> MatchPlan:
        target_frame = torch.searchsorted(frame_offsets[1:].contiguous(), target, right=True)
        sequence = torch.searchsorted(sequence_offsets[1:].contiguous(), target_frame, right=True)
        row_token, row = torch.unique(anchor, return_inverse=True)
        rows = RowPlan.build(row_token, frame_offsets, sequence_offsets)
        cell = row * rows.longest + target_frame - sequence_offsets[sequence]
        order = _argsort(row, target)
        runs = torch.bincount(cell, minlength=len(row_token) * rows.longest)
        counts = countable & _frames_with(known, frame_offsets)[target_frame]
        return MatchPlan(
            rows=rows,
            run_start=torch.cat([runs.new_zeros(1), runs.cumsum(0)]),
            order=order,
            row=row[order],
            target=target[order],
            depth=_kept(target_depth, counts)[order],
            counts=counts[order],
            by_target=torch.argsort(target[order], stable=True),
            depth_count=counts.sum().clamp(min=1).float(),
            values=_kept(patch_depth, known)[:, None],
            known=known,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, those of `rows` first."""
        return self.rows.tensors() + [getattr(self, name) for name in _MATCH_FIELDS]

    @staticmethod
    def from_tensors(tensors: list[Tensor]) -> MatchPlan:
        split = len(tensors) - len(_MATCH_FIELDS)
        rows = RowPlan.from_tensors(tensors[:split])
        return MatchPlan(rows=rows, **dict(zip(_MATCH_FIELDS, tensors[split:], strict=True)))


_ROW_FIELDS = [f.name for f in fields(RowPlan)]
_MATCH_FIELDS = [f.name for f in fields(MatchPlan) if f.name != "rows"]


def _argsort(major: Tensor, minor: Tensor) -> Tensor:
    """Stable order by (major, minor)."""
    order = torch.argsort(minor, stable=True)
    return order[torch.argsort(major[order], stable=True)]


def _frames_with(known: Tensor, frame_offsets: Tensor) -> Tensor:
    """Bool [F]: frames with at least one known token."""
    seen = torch.cat([torch.zeros(1, dtype=torch.long, device=known.device), known.long().cumsum(0)])
    return seen[frame_offsets[1:]] > seen[frame_offsets[:-1]]


def _kept(depth: Tensor | None, keep: Tensor) -> Tensor:
    """float32, zero where there is no depth to keep."""
    if depth is None:
        return torch.zeros(keep.shape, dtype=torch.float32, device=keep.device)
    return torch.where(keep, depth, 0).float()
