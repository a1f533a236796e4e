"""Launches of the narrow strategy's kernels: tile sizes, block tables, and what each kernel is given.

Tensors only, for embeddings of up to 512 bytes; the algorithm is told in `narrow_kernels`, the order of the passes in
`narrow`.

**Block tables.** Tokens are cut into blocks that stay within a frame, rows into blocks that stay within a sequence.
Both tables are computed from the host's copy of the plan and sent along: the device is never asked for a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import narrow_kernels as device
from .chunk import FrameStatistics, FrameUpstream, MatchScales
from .plan import MatchPlan, RowPlan
from .rows_triton import strides, unwritten_statistics, value_width
from .triton_launch import INTERPRETED, Tile, cdiv, launch, power_of_two

LONGEST = 512  # bytes of an embedding
# One 16-byte load a lane covers 256 numbers of two bytes: a warp for each of a match's two embeddings, twice over.
POSITIVE_TILE = Tile(rows=8, columns=256, warps=4)
# One warp for four tokens: four embeddings of 256 numbers are 32 registers a lane, and their loads fly together.
TOKENS_AT_ONCE = 4


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three walks: which rows (or tokens) are kept, and how many of the others walk by at a time."""

    statistics: Tile
    row_gradient: Tile
    token_gradient: Tile


# What is kept is kept whole (64 or 128 embeddings), with a float32 accumulator of the same size in registers; what
# walks by comes in blocks of 64, the least with which wgmma's reading of shared memory keeps up with its arithmetic,
# two or three of them in flight. Register counts are ptxas' for sm_90; none of these spills, which
# tests/loss/test_triton_aot.py asserts (for the pinned Triton 3.7; 3.6 spills 36 bytes in LONG_HALF's last walk).
#
# Up to 256 bytes an embedding (D = 128 in 16 bits, 64 in TF32): 64 x 64 with one warpgroup. About 220 registers a
# thread and at most 80 KiB: two programs share a multiprocessor, one exponentiates while the other multiplies.
SHORT = Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
# Up to 512 bytes: an accumulator of 128 x 256 takes 128 registers of each of two warpgroups' threads, about 255 with
# the tile; 64 KiB kept and 32 KiB for each block that walks by, so one program to a multiprocessor.
LONG = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3))
# fp16 is normalised on its way through registers, which leaves room for 64 kept embeddings only.
LONG_HALF = Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
# TF32 embeddings are twice as long: 32 at a time walk by.
LONG_TF32 = Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 8, 3), Tile(32, 64, 8, 3))
# Where a multiprocessor has 99 KiB only (sm_86, sm_89, sm_120): 32 KiB kept, 16 KiB for each block that walks by.
LONG_SMALL = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2))
# IEEE float32 has no tensor core and is not eligible; this serves whoever calls the functions nevertheless.
IEEE = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def tiles_for(embeddings: Tensor) -> Tiles:
    """The fixed configuration for embeddings of this type and width on this device."""
    length = embeddings.element_size() * power_of_two(embeddings.shape[-1], least=16)
    if embeddings.dtype == torch.float32 and not tf32_allowed():
        return IEEE
    if length <= 256:
        return SHORT
    if not _roomy(embeddings.device):
        return LONG_SMALL
    return {torch.float16: LONG_HALF, torch.float32: LONG_TF32}.get(embeddings.dtype, LONG)


def _roomy(device: torch.device) -> bool:
    """Whether a program may use 160 KiB of shared memory; without a GPU the answer of sm_90."""
    if device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    return capability[0] in (9, 10) or capability in ((8, 0), (8, 7))


@dataclass(frozen=True)
class Problem:
    """Embeddings and all that a kernel of this strategy needs to know to make similarities of them."""

    embeddings: Tensor  # [G, N, D]
    inverse_norm: Tensor  # float32 [G, N], contiguous
    rows: RowPlan
    temperature: Tensor  # float32 []
    values: Tensor | None  # float32 [N, V]
    known: Tensor | None  # bool [N]
    exclude_own: bool

    def layers(self, start: int, end: int) -> Problem:
        rest = (self.rows, self.temperature, self.values, self.known, self.exclude_own)
        return Problem(self.embeddings[start:end], self.inverse_norm[start:end], *rest)

    def arguments(self) -> dict:
        width = self.embeddings.shape[-1]
        count = value_width(self.values, self.known)
        values = self.inverse_norm if self.values is None else self.values.contiguous()
        return {
            **embedding_arguments(self.embeddings, self.inverse_norm, self.temperature),
            "row_token": self.rows.row_token,
            "values": values,
            "values_n": values.stride(0),
            "known": self.rows.row_token if self.known is None else self.known,
            "rows": self.rows.row_token.shape[0],
            "frames": self.rows.longest,
            "EXCLUDE_OWN": self.exclude_own,
            "VALUES": count,
            "BLOCK_WIDTH": power_of_two(width, least=16),
            "NORMALISED": self.embeddings.dtype == torch.float16,
            "UPCAST": INTERPRETED and self.embeddings.dtype == torch.bfloat16,
            "PRECISION": "tf32" if tf32_allowed() else "ieee",
        }


def embedding_arguments(embeddings: Tensor, inverse_norm: Tensor, temperature: Tensor) -> dict:
    return {
        "embeddings": embeddings,
        **strides("stride", embeddings, "gnd"),
        "inverse_norm": inverse_norm,
        "tokens": embeddings.shape[1],
        "temperature": temperature,
        "WIDTH": embeddings.shape[2],
    }


def tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def stream_statistics(problem: Problem, run_start: Tensor | None) -> FrameStatistics:
    """[G, A, P] statistics of all rows; `best` is a token of the batch.

    With `run_start` (that of a `MatchPlan`), blocks of rows without a match in a frame leave it out.
    """
    tile = tiles_for(problem.embeddings).statistics
    arguments = problem.arguments()
    groups, rows, frames = problem.embeddings.shape[0], arguments["rows"], arguments["frames"]
    found = unwritten_statistics(groups, rows, frames, arguments["VALUES"], problem.embeddings.device)
    blocks = row_blocks(problem, tile)
    arguments |= {
        "row_blocks": blocks,
        "frame_offsets": problem.rows.frame_offsets,
        "run_start": problem.rows.row_token if run_start is None else run_start,
        **found._asdict(),
        "PADDED_VALUES": power_of_two(arguments["VALUES"]),
        "BY_RUN": run_start is not None,
    }
    grid = (blocks.shape[0] * frames, groups)
    launch(device.statistics, grid, tile, arguments, written=FrameStatistics._fields)
    return found


def positive_similarities(
    embeddings: Tensor, inverse_norm: Tensor, plan: MatchPlan, temperature: Tensor
) -> Tensor:  # float32 [G, M], sorted
    """Scaled similarity of each match's two tokens."""
    groups, matches = embeddings.shape[0], plan.target.shape[0]
    out = torch.empty(groups, matches, dtype=torch.float32, device=embeddings.device)
    arguments = {
        **embedding_arguments(embeddings, inverse_norm, temperature),
        "row_token": plan.rows.row_token,
        "row": plan.row,
        "target": plan.target,
        "out": out,
        "matches": matches,
    }
    launch(device.positives, (cdiv(matches, POSITIVE_TILE.rows), groups), POSITIVE_TILE, arguments, written=("out",))
    return out


def stream_row_gradient(
    problem: Problem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    boost: Tensor,  # float32 [G], powers of two
    out: Tensor,  # float32 [G, A, D], contiguous
) -> None:
    """What flows into each row from all tokens of its sequence: `(X E)_i`, without the pulls of matches."""
    tile = tiles_for(problem.embeddings).row_gradient
    blocks = row_blocks(problem, tile)
    arguments = {
        **problem.arguments(),
        **_statistics_arguments(statistics, upstream),
        "boost": boost,
        "row_blocks": blocks,
        "token_blocks": token_blocks(problem, tile),
        "out": out,
    }
    launch(device.row_gradient, (blocks.shape[0], problem.embeddings.shape[0]), tile, arguments, written=("out",))


def stream_token_gradient(
    problem: Problem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    boost: Tensor,
    out: Tensor,  # float32 [G, N, D]
) -> None:
    """What flows into each token from all rows of its sequence: `(X^T A)_k`, without the pulls of matches."""
    tile = tiles_for(problem.embeddings).token_gradient
    blocks = token_blocks(problem, tile)
    arguments = {
        **problem.arguments(),
        **_statistics_arguments(statistics, upstream),
        "boost": boost,
        "token_blocks": blocks,
        "out": out,
        **strides("out", out, "gnd"),
    }
    launch(device.token_gradient, (blocks.shape[0], problem.embeddings.shape[0]), tile, arguments, written=("out",))


def finish_gradient(
    problem: Problem,
    plan: MatchPlan | None,
    scales: MatchScales | None,
    row_part: Tensor,  # float32 [G, A, D]
    token_part: Tensor | None,  # float32 [G, N, D], may be `out`
    out: Tensor | None,  # [G, N, D]
) -> Tensor:
    """Write every token's gradient, pulls of matches included; returns `e_i . dA_i` of each row, float32 [G, A]."""
    groups, tokens, width = problem.embeddings.shape
    unread = problem.rows.row_token
    slopes = torch.empty(row_part.shape[:2], dtype=torch.float32, device=row_part.device)
    part, to = (row_part, row_part) if token_part is None or out is None else (token_part, out)
    arguments = {
        **embedding_arguments(problem.embeddings, problem.inverse_norm, problem.temperature),
        "row_token": problem.rows.row_token,
        "row_of_token": _row_of_token(problem),
        "row_part": row_part,
        "token_part": part,
        **strides("token_part", part, "gnd"),
        "target_start": unread,
        "slopes": slopes,
        "out": to,
        **strides("out", to, "gnd"),
        "rows": row_part.shape[1],
        "frames": problem.rows.longest,
        "limit": torch.finfo(to.dtype).max,
        "WITH_TOKENS": out is not None,
    }
    names = {name: name for name in ("run_start", "target", "by_target", "order")} | {"row_of_match": "row"}
    if plan is None or scales is None:
        arguments |= dict.fromkeys(names, unread) | {"corr_scale": row_part, "corr_scale_g": 0, "corr_scale_m": 0}
    else:
        arguments |= {name: getattr(plan, source) for name, source in names.items()}
        arguments |= {"corr_scale": scales.corr, **strides("corr_scale", scales.corr, "gm")}
        arguments["target_start"] = _target_start(plan, tokens)
    arguments["WITH_MATCHES"] = plan is not None and scales is not None
    tile = Tile(rows=TOKENS_AT_ONCE, columns=power_of_two(width), warps=1)
    launch(device.finish, (cdiv(tokens, tile.rows), groups), tile, arguments, written=("slopes", "out"))
    return slopes


def row_blocks(problem: Problem, tile: Tile) -> Tensor:
    """int64 [blocks, 6]: first and last row, first frame, frames, first and last of the sequence's token blocks."""
    spans = tuple(map(tuple, problem.rows.spans.tolist()))
    ends = tuple(problem.rows.frame_ends.tolist())
    return _row_blocks(spans, ends, tile.rows, tile.columns).to(problem.embeddings.device, non_blocking=True)


def token_blocks(problem: Problem, tile: Tile) -> Tensor:
    """int64 [blocks, 5]: first and last token, the frame within the sequence, first and last row of the sequence."""
    spans = tuple(map(tuple, problem.rows.spans.tolist()))
    ends = tuple(problem.rows.frame_ends.tolist())
    return _token_blocks(spans, ends, tile.columns).to(problem.embeddings.device, non_blocking=True)


Spans = tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=64)
def _row_blocks(spans: Spans, ends: tuple[int, ...], rows: int, columns: int) -> Tensor:
    table, frame, row, block = [], 0, 0, 0
    for _, next_frame, next_row in spans:
        begins = (0, *ends)
        after = block + sum(cdiv(ends[f] - begins[f], columns) for f in range(frame, next_frame))
        for first in range(row, next_row, rows):
            table.append((first, min(first + rows, next_row), frame, next_frame - frame, block, after))
        frame, row, block = next_frame, next_row, after
    return torch.tensor(table, dtype=torch.int64).view(-1, 6)


@lru_cache(maxsize=64)
def _token_blocks(spans: Spans, ends: tuple[int, ...], columns: int) -> Tensor:
    table, frame, row, token = [], 0, 0, 0
    for _, next_frame, next_row in spans:
        for nth, end in enumerate(ends[frame:next_frame]):
            for first in range(token, end, columns):
                table.append((first, min(first + columns, end), nth, row, next_row))
            token = end
        frame, row = next_frame, next_row
    return torch.tensor(table, dtype=torch.int64).view(-1, 5)


def _row_of_token(problem: Problem) -> Tensor:
    """int64 [N]: which row a token is, or -1."""
    rows = problem.rows.row_token
    token = torch.arange(problem.embeddings.shape[1], device=rows.device)
    if rows.shape[0] == 0:
        return torch.full_like(token, -1)
    nearest = torch.searchsorted(rows, token).clamp(max=rows.shape[0] - 1)
    return torch.where(rows[nearest] == token, nearest, -1)


def _target_start(plan: MatchPlan, tokens: int) -> Tensor:
    """int64 [N + 1]: the matches that land on token k are `by_target[target_start[k] : target_start[k + 1]]`."""
    token = torch.arange(tokens + 1, device=plan.target.device)
    return torch.searchsorted(plan.target[plan.by_target], token)


def _statistics_arguments(statistics: FrameStatistics, upstream: FrameUpstream) -> dict:
    return {
        "lse": statistics.lse.contiguous(),
        "known_lse": statistics.known_lse.contiguous(),
        "expected": statistics.expected.contiguous(),
        "upstream_lse": upstream.lse.contiguous(),
        "upstream_expected": upstream.expected.contiguous(),
    }
