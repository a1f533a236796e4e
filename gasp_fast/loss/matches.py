"""`Matches`: the ground truth of the geometric losses, as token indices, frames and depths.

A `Matches` is checked once, when it is created. Its users need not read the numbers again, which would make the host
wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from gasp_fast.kernels.index import MatchIndex

from .arguments import FLOATS, check_ascending, check_indices

MOST_DEPTH = 1e18  # a larger one is unknown, as infinity is: the loss divides by the square of a sum of two in float32
MOST_TOKENS = 2**31  # of a batch: more is a mistake in the offsets, and would exhaust the memory


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Matches:
    """Point correspondences between the frames of one or several sequences, as token indices.

    The tokens of all frames lie back to back, and so do the frames of all sequences. Frames may differ in size; an
    anchor may have no, one or several targets; the same match may occur twice.
    """

    frame_offsets: Tensor  # int64 [F + 1], tokens [frame_offsets[f], frame_offsets[f + 1]) belong to frame f
    sequence_offsets: Tensor | None = None  # int64 [B + 1], frame range of each sequence; None = one sequence
    anchor: Tensor  # int64 [M]
    target: Tensor  # int64 [M], in another frame of the anchor's sequence
    target_depth: Tensor | None = None  # float [M], depth of the tracked point where it lands in the target frame
    depth_valid: Tensor | None = None  # bool [M], counts in the depth term; None = every depth > 0 and <= 1e18
    patch_depth: Tensor | None = None  # float [N], mean depth over each token's patch; unknown: <= 0, > 1e18 or NaN
    token_xy: Tensor | None = None  # int [N, 2], column and row of each token on the grid of its frame
    weight: Tensor | None = None  # float [M], how much each match counts in every mean and sum; None = 1 each
    index: MatchIndex = field(init=False)  # rows and matches in the order of the kernels

    @torch.inference_mode(False)  # also for a caller in inference mode: its tensors could not be trained with
    def __post_init__(self) -> None:
        _check_kinds(self)
        for name in _DTYPES:
            value = getattr(self, name)
            if value is not None and value.is_inference():
                object.__setattr__(self, name, value.clone())
        _check_offsets(self)
        _check_matches(self)
        index = MatchIndex.build(
            frame_offsets=self.frame_offsets,
            sequence_offsets=self._sequence_offsets(),
            anchor=self.anchor,
            target=self.target,
            target_depth=self.target_depth,
            countable=self.countable_depth(),
            patch_depth=self.patch_depth,
            known=self.known_depth(),
            weight=self.weight,
        )
        object.__setattr__(self, "index", index)

    @cached_property
    def target_xy(self) -> Tensor | None:
        """`token_xy` of each match's target, int [M, 2]; looked up once, not for every layer."""
        return None if self.token_xy is None else self.token_xy[self.target]

    @property
    def tokens(self) -> int:
        """N, the number of tokens that `frame_offsets` covers."""
        return self.index.known.shape[0]

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def __len__(self) -> int:
        return self.anchor.shape[0]

    @torch.inference_mode(False)
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Matches:
        """The same matches on another device. Nothing is checked or indexed again, so nothing waits."""
        if torch.device(device) == self.device:
            return self
        moved = object.__new__(Matches)
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            object.__setattr__(moved, name, None if value is None else value.to(device, non_blocking=non_blocking))
        return moved

    @torch.inference_mode(False)
    def pin_memory(self) -> Matches:
        """The same matches in page-locked memory: a `DataLoader` with `pin_memory=True` calls this."""
        pinned = object.__new__(Matches)
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            object.__setattr__(pinned, name, None if value is None else value.pin_memory())
        return pinned

    @staticmethod
    def pack(parts: Sequence[Matches]) -> Matches:
        """Join several sequences into one batch; their tokens lie back to back in this order.

        An optional field that only some parts have is filled in the others: no depth, nothing valid, a weight of 1.
        `token_xy` has no such value: either all parts have it, or none.
        """
        if not parts:
            raise ValueError("parts is empty; Matches.pack needs at least one Matches")
        devices = {part.device for part in parts}
        if len(devices) > 1:
            raise ValueError(f"parts lie on several devices ({', '.join(sorted(map(str, devices)))}); move them first")
        if len({part.token_xy is None for part in parts}) > 1:
            missing = next(i for i, part in enumerate(parts) if part.token_xy is None)
            raise ValueError(f"parts[{missing}].token_xy is None while others have it; give it to all or to none")
        token_starts = _starts([part.tokens for part in parts])
        frame_starts = _starts([part.frame_offsets.shape[0] - 1 for part in parts])
        return Matches(
            frame_offsets=_join_offsets([part.frame_offsets for part in parts], token_starts),
            sequence_offsets=_join_offsets([part._sequence_offsets() for part in parts], frame_starts),
            anchor=torch.cat([part.anchor + start for part, start in zip(parts, token_starts, strict=True)]),
            target=torch.cat([part.target + start for part, start in zip(parts, token_starts, strict=True)]),
            target_depth=_join_optional([(part.target_depth, len(part)) for part in parts], float("nan")),
            depth_valid=_join_valid(parts),
            patch_depth=_join_optional([(part.patch_depth, part.tokens) for part in parts], 0.0),
            weight=_join_optional([(part.weight, len(part)) for part in parts], 1.0),
            token_xy=None if parts[0].token_xy is None else torch.cat([_not_none(part.token_xy) for part in parts]),
        )

    def with_shares(self, corr: Tensor, depth: Tensor) -> Matches:
        """The same matches in another mean: `reduction="mean"` adds the terms of match m times `corr[m]`, `depth[m]`.

        Both are [M], or [1] where all matches count alike. Metrics are averaged as the correspondence term is.
        """
        shared = object.__new__(Matches)
        for name in (f.name for f in fields(self)):
            object.__setattr__(shared, name, getattr(self, name))
        object.__setattr__(shared, "index", replace(self.index, corr_share=corr, depth_share=depth))
        return shared

    def sequence_of_matches(self) -> Tensor:
        """int64 [M], the number of the sequence of each match."""
        ends = self.frame_offsets[self._sequence_offsets()[1:]]  # [B], tokens
        return torch.searchsorted(ends, self.anchor, right=True)

    def countable_depth(self) -> Tensor:
        """Bool [M]: the matches that count in the depth term by their own data (a depth from 0 to `MOST_DEPTH`)."""
        if self.target_depth is None:
            return torch.zeros(len(self), dtype=torch.bool, device=self.device)
        sound = _known(self.target_depth)
        return sound if self.depth_valid is None else sound & self.depth_valid

    def known_depth(self) -> Tensor:
        """Bool [N]: the tokens whose patch depth is known."""
        if self.patch_depth is None:
            return torch.zeros(int(self.frame_offsets[-1]), dtype=torch.bool, device=self.device)
        return _known(self.patch_depth)

    def _sequence_offsets(self) -> Tensor:
        if self.sequence_offsets is not None:
            return self.sequence_offsets
        return torch.tensor([0, self.frame_offsets.shape[0] - 1], device=self.device)

    def __repr__(self) -> str:
        frames, sequences = self.index.rows.frame_ends.shape[0], self.index.rows.spans.shape[0]
        return (
            f"Matches({len(self)} matches from {self.index.rows.row_token.shape[0]} anchors, "
            f"{int(self.index.has_depth.sum())} with depth; {self.tokens} tokens in {frames} frames of "
            f"{sequences} sequence{'s' if sequences != 1 else ''}, on {self.device})"
        )


_DTYPES: dict[str, tuple[str, int]] = {  # field -> what its numbers are, how many dimensions it has
    "frame_offsets": ("int64", 1),
    "sequence_offsets": ("int64", 1),
    "anchor": ("int64", 1),
    "target": ("int64", 1),
    "target_depth": ("floating", 1),
    "depth_valid": ("bool", 1),
    "patch_depth": ("floating", 1),
    "token_xy": ("integer", 2),
    "weight": ("floating", 1),
}
_REQUIRED = ("frame_offsets", "anchor", "target")


def _check_kinds(matches: Matches) -> None:
    """Types, dimensions and devices: all that can be checked without reading a number."""
    for name, (kind, dimensions) in _DTYPES.items():
        value = getattr(matches, name)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; pass a torch tensor of {kind} numbers")
        if not _is_kind(value.dtype, kind):
            raise TypeError(f"{name} has dtype {value.dtype}; it must be {kind} (use {name}.{_CASTS[kind]})")
        if value.dim() != dimensions:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must have {dimensions} dimension(s)")
        if value.device != matches.frame_offsets.device:
            raise ValueError(
                f"{name} lies on {value.device}, frame_offsets on {matches.frame_offsets.device}; use one device"
            )
    if matches.device.type == "meta":
        raise ValueError("anchor lies on meta, where tensors have no values; make the Matches on the CPU and move it")
    if matches.anchor.shape != matches.target.shape:
        raise ValueError(f"anchor has {len(matches.anchor)} entries, target {len(matches.target)}; they go in pairs")
    for name in ("target_depth", "depth_valid", "weight"):
        value = getattr(matches, name)
        if value is not None and len(value) != len(matches.anchor):
            raise ValueError(f"{name} has {len(value)} entries, anchor {len(matches.anchor)}; one is needed per match")
    if matches.depth_valid is not None and matches.target_depth is None:
        raise ValueError("depth_valid is given without target_depth; pass both or neither")
    if matches.token_xy is not None and matches.token_xy.shape[1] != 2:
        raise ValueError(f"token_xy has shape {list(matches.token_xy.shape)}; it must be [N, 2] (column, row)")


_CASTS = {"int64": "long()", "floating": "float()", "bool": "bool()", "integer": "long()"}


def _is_kind(dtype: torch.dtype, kind: str) -> bool:
    if kind == "floating":
        return dtype in FLOATS
    if kind == "integer":
        return dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    return dtype == getattr(torch, kind)


def _check_offsets(matches: Matches) -> None:
    check_ascending("frame_offsets", matches.frame_offsets, "token")
    frames, tokens = matches.frame_offsets.shape[0] - 1, int(matches.frame_offsets[-1])
    if tokens > MOST_TOKENS:
        raise ValueError(f"frame_offsets ends at {tokens}; a batch has at most {MOST_TOKENS} tokens, check the offsets")
    if matches.sequence_offsets is not None:
        check_ascending("sequence_offsets", matches.sequence_offsets, "frame")
        last = int(matches.sequence_offsets[-1])
        if last != frames:
            raise ValueError(
                f"sequence_offsets ends at {last}, but frame_offsets describes {frames} frames; they must agree"
            )
    for name in ("patch_depth", "token_xy"):
        value = getattr(matches, name)
        if value is not None and value.shape[0] != tokens:
            raise ValueError(f"{name} has {value.shape[0]} entries, frame_offsets ends at {tokens}; one per token")


def _check_matches(matches: Matches) -> None:
    """Indices in range, two different frames, one sequence; weights that can be summed."""
    tokens = int(matches.frame_offsets[-1])
    check_indices("anchor", matches.anchor, tokens)
    check_indices("target", matches.target, tokens)
    frame_of = matches.frame_offsets[1:].contiguous()
    anchor_frame = torch.searchsorted(frame_of, matches.anchor, right=True)
    target_frame = torch.searchsorted(frame_of, matches.target, right=True)
    _refuse(
        anchor_frame == target_frame,
        lambda at: (
            f"target[{at}] = {int(matches.target[at])} lies in frame {int(target_frame[at])}, the frame of its anchor "
            f"{int(matches.anchor[at])}; a match needs two frames"
        ),
    )
    sequence_of = matches._sequence_offsets()[1:].contiguous()
    anchor_sequence = torch.searchsorted(sequence_of, anchor_frame, right=True)
    target_sequence = torch.searchsorted(sequence_of, target_frame, right=True)
    _refuse(
        anchor_sequence != target_sequence,
        lambda at: (
            f"target[{at}] = {int(matches.target[at])} lies in sequence {int(target_sequence[at])}, its anchor in "
            f"sequence {int(anchor_sequence[at])}; a match stays inside one sequence"
        ),
    )
    weight = matches.weight
    if weight is not None:
        if weight.requires_grad:
            raise ValueError("weight requires grad; it belongs to the ground truth (use weight.detach())")
        _refuse(
            ~(weight.isfinite() & (weight >= 0)),
            lambda at: f"weight[{at}] = {float(weight[at])}; it must be finite and not negative",
        )


def _known(depth: Tensor) -> Tensor:
    wide = depth.double()  # compared with a float16, `MOST_DEPTH` would be infinity
    return (wide > 0) & (wide <= MOST_DEPTH)


def _refuse(bad: Tensor, message: Callable[[int], str]) -> None:
    where = bad.nonzero()
    if len(where):
        raise ValueError(message(int(where[0])))


def _starts(sizes: Sequence[int]) -> list[int]:
    return reduce(lambda starts, size: [*starts, starts[-1] + size], sizes[:-1], [0])


def _join_offsets(offsets: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    shifted = [part[1:] + start for part, start in zip(offsets, starts, strict=True)]
    return torch.cat([offsets[0][:1], *shifted])


def _join_optional(parts: Sequence[tuple[Tensor | None, int]], unknown: float) -> Tensor | None:
    first = next((value for value, _ in parts if value is not None), None)
    if first is None:
        return None
    return torch.cat([first.new_full((size,), unknown) if value is None else value for value, size in parts])


def _join_valid(parts: Sequence[Matches]) -> Tensor | None:
    if all(part.depth_valid is None for part in parts):
        return None
    return torch.cat([part.countable_depth() for part in parts])


def _not_none(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
