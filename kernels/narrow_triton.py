"""Launches of the narrow strategy's kernels: tile sizes, block tables, arguments.

For embeddings of up to 512 bytes. The algorithm is explained in `narrow_kernels`, the order of the passes in `narrow`.
Each launch lists its arguments in the order of the kernel's signature.

**Block tables.** Tokens are cut into blocks that stay within a frame, rows into blocks that stay within a sequence.
Both tables are computed on the host, from the index, and copied to the device: no launch waits for a number from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import narrow_kernels as device
from .chunk import FrameStatistics, FrameUpstream, Problem, TermWeights
from .index import MatchIndex, RowIndex
from .narrow_kernels import RowBlock, TokenBlock
from .rows_triton import empty_statistics, inverse_norms, value_width
from .triton_launch import INTERPRETED, Tile, cdiv, launch, power_of_two

MAX_EMBEDDING_BYTES = 512  # bytes of an embedding
# One 16-byte load a lane covers 256 numbers of two bytes, a whole embedding. Each warp computes two of the matches.
MATCH_TILE = Tile(rows=8, columns=256, warps=4)
# One warp for four tokens: four embeddings of 256 numbers take 32 registers a lane, and the four loads overlap.
TOKENS_AT_ONCE = 4


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three streaming kernels: how many rows by how many tokens. One side is resident, one is streamed:
    `token_gradient` streams rows, the others stream tokens."""

    statistics: Tile
    row_gradient: Tile
    token_gradient: Tile


# The resident tile is 64 or 128 whole embeddings, with a float32 accumulator of the same size in registers. The others
# are streamed in blocks of 64, two or three of them in flight; with smaller blocks wgmma would wait for its reads of
# shared memory. Register counts are those of ptxas for sm_90. tests/kernels/test_triton_aot.py asserts that SHORT,
# LONG, LONG_HALF and LONG_TF32 do not spill (with the pinned Triton 3.7; with 3.6, LONG_HALF's token_gradient spills
# 36 bytes).
#
# Up to 256 bytes an embedding (D = 128 in 16 bits, 64 in TF32): 64 x 64 with one warpgroup. About 220 registers a
# thread and at most 80 KiB: two programs share a multiprocessor, one does exponentials while the other multiplies.
SHORT = Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
# Up to 512 bytes: an accumulator of 128 x 256 takes 128 registers of each of two warpgroups' threads, about 255 with
# the tile; 64 KiB resident and 32 KiB for each streamed block, so one program to a multiprocessor.
LONG = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3))
# fp16 is normalised on its way through registers, which leaves room for 64 resident embeddings only.
LONG_HALF = Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
# TF32 embeddings are twice as long: 32 are streamed at a time.
LONG_TF32 = Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 8, 3), Tile(32, 64, 8, 3))
# Where a multiprocessor has 99 KiB only (sm_86, sm_89, sm_120): 32 KiB resident, 16 KiB for each streamed block.
LONG_SMALL = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2))
# IEEE float32 has no tensor core and is not eligible; these tiles are for tests that call the functions directly.
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
    """Whether a program may use 160 KiB of shared memory. Without a GPU the answer is that of sm_90."""
    if device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    return capability[0] in (9, 10) or capability in ((8, 0), (8, 7))


@dataclass(frozen=True)
class NormedProblem(Problem):
    """A problem, and the inverse norms of its embeddings."""

    inverse_norm: Tensor  # float32 [L, N], contiguous

    @staticmethod
    def of(problem: Problem) -> NormedProblem:
        return NormedProblem(**vars(problem), inverse_norm=inverse_norms(problem.embeddings))

    def of_layers(self, layers: slice) -> NormedProblem:
        return replace(self, embeddings=self.embeddings[layers], inverse_norm=self.inverse_norm[layers])

    def embedding_arguments(self) -> tuple[Any, ...]:
        """The first arguments of every kernel, from `embeddings` to `row_token`."""
        embeddings = self.embeddings
        return (
            embeddings, *embeddings.stride(), self.inverse_norm, embeddings.shape[1], self.temperature,
            self.rows.row_token,
        )  # fmt: skip

    def value_arguments(self) -> tuple[Any, ...]:
        """Kernel arguments from `values` to `known`."""
        if self.values is None or self.known is None:
            return None, None, None
        values = self.values.contiguous()
        return values, values.stride(0), self.known

    def constants(self) -> dict[str, Any]:
        """The constants that the streaming kernels share."""
        dtype, width = self.embeddings.dtype, self.embeddings.shape[-1]
        return {
            "EXCLUDE_OWN": self.exclude_own,
            "VALUES": value_width(self.values, self.known),
            "WIDTH": width,
            "BLOCK_WIDTH": power_of_two(width, least=16),
            "NORMALISED": dtype == torch.float16,
            "UPCAST": INTERPRETED and dtype == torch.bfloat16,
            "PRECISION": "tf32" if tf32_allowed() else "ieee",
        }


def tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def stream_statistics(problem: NormedProblem, run_start: Tensor | None) -> FrameStatistics:
    """[G, A, P] statistics of all rows; `best` is a token of the batch.

    With `run_start` (that of a `MatchIndex`), a block of rows skips the frames in which it has no match.
    """
    tile = tiles_for(problem.embeddings).statistics
    groups, rows, frames = problem.embeddings.shape[0], problem.rows.row_token.shape[0], problem.rows.longest
    width = value_width(problem.values, problem.known)
    statistics = empty_statistics(groups, rows, frames, width, problem.embeddings.device)
    blocks = row_blocks(problem, tile)
    launch(
        device.statistics, (blocks.shape[0] * frames, groups), tile,
        *problem.embedding_arguments(),
        *problem.value_arguments(), blocks, problem.rows.frame_offsets, run_start,
        *statistics, rows, frames,
        PADDED_VALUES=power_of_two(width), **problem.constants(),
    )  # fmt: skip
    return statistics


def match_similarities(problem: NormedProblem, index: MatchIndex) -> Tensor:  # float32 [G, M], sorted
    """Scaled similarity of each match's two tokens."""
    groups, matches = problem.embeddings.shape[0], index.target.shape[0]
    out = torch.empty(groups, matches, dtype=torch.float32, device=problem.embeddings.device)
    launch(
        device.match_similarities, (cdiv(matches, MATCH_TILE.rows), groups), MATCH_TILE,
        *problem.embedding_arguments(),
        index.row, index.target, out, matches,
        WIDTH=problem.embeddings.shape[-1],
    )  # fmt: skip
    return out


def stream_row_gradient(
    problem: NormedProblem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    boost: Tensor,  # float32 [G], powers of two
    out: Tensor,  # float32 [G, A, D], contiguous
) -> None:
    """The gradient of each row, from all tokens of its sequence: `(X E)_i`, without the pulls of matches."""
    tile = tiles_for(problem.embeddings).row_gradient
    blocks = row_blocks(problem, tile)
    launch(
        device.row_gradient, (blocks.shape[0], problem.embeddings.shape[0]), tile,
        *problem.embedding_arguments(),
        *problem.value_arguments(), blocks, token_blocks(problem, tile),
        *_statistics_arguments(statistics, upstream), boost, out, out.shape[1], problem.rows.longest,
        **problem.constants(),
    )  # fmt: skip


def stream_token_gradient(
    problem: NormedProblem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    boost: Tensor,
    out: Tensor,  # float32 [G, N, D]
) -> None:
    """The gradient of each token, from all rows of its sequence: `(X^T A)_k`, without the pulls of matches."""
    tile = tiles_for(problem.embeddings).token_gradient
    blocks = token_blocks(problem, tile)
    launch(
        device.token_gradient, (blocks.shape[0], problem.embeddings.shape[0]), tile,
        *problem.embedding_arguments(),
        *problem.value_arguments(), blocks,
        *_statistics_arguments(statistics, upstream), boost, out, *out.stride(),
        problem.rows.row_token.shape[0], problem.rows.longest,
        **problem.constants(),
    )  # fmt: skip


def finish_gradient(
    problem: NormedProblem,
    index: MatchIndex | None,
    weights: TermWeights | None,
    row_part: Tensor,  # float32 [G, A, D]
    token_part: Tensor | None,  # float32 [G, N, D], may be `out`
    out: Tensor | None,  # [G, N, D]
) -> Tensor:
    """Write every token's gradient, pulls of matches included; returns `e_i . dA_i` of each row, float32 [G, A]."""
    groups, tokens, width = problem.embeddings.shape
    radial = torch.empty(row_part.shape[:2], dtype=torch.float32, device=row_part.device)
    tile = Tile(rows=TOKENS_AT_ONCE, columns=power_of_two(width), warps=1)
    launch(
        device.finish, (cdiv(tokens, tile.rows), groups), tile,
        *problem.embedding_arguments(),
        _row_of_token(problem), row_part, *((None,) * 4 if token_part is None else (token_part, *token_part.stride())),
        *((None,) * 9 if index is None or weights is None else
          (index.run_start, index.target, _target_start(index, tokens), index.by_target, index.row, index.order,
           weights.corr, *weights.corr.stride())),
        radial, *((None,) * 4 if out is None else (out, *out.stride())), row_part.shape[1], problem.rows.longest,
        None if out is None else torch.finfo(out.dtype).max,
        WIDTH=width,
    )  # fmt: skip
    return radial


def row_blocks(problem: NormedProblem, tile: Tile) -> Tensor:
    """int64 [blocks, 6]: the columns of `RowBlock`."""
    table = _row_blocks(*_layout(problem.rows), tile.rows, tile.columns)
    return table.to(problem.embeddings.device, non_blocking=True)


def token_blocks(problem: NormedProblem, tile: Tile) -> Tensor:
    """int64 [blocks, 5]: the columns of `TokenBlock`."""
    return _token_blocks(*_layout(problem.rows), tile.columns).to(problem.embeddings.device, non_blocking=True)


Spans = tuple[tuple[int, int, int], ...]  # end of each sequence in tokens, frames, rows


def _layout(rows: RowIndex) -> tuple[Spans, tuple[int, ...]]:
    """The ends of sequences and of frames, as keys of the caches below."""
    return tuple(map(tuple, rows.spans.tolist())), tuple(rows.frame_ends.tolist())


@lru_cache(maxsize=64)
def _row_blocks(spans: Spans, frame_ends: tuple[int, ...], rows: int, columns: int) -> Tensor:
    table, begins = [], (0, *frame_ends)
    frame = row = token_block = 0
    for _, end_frame, end_row in spans:
        end_token_block = token_block + sum(cdiv(frame_ends[f] - begins[f], columns) for f in range(frame, end_frame))
        table += [
            RowBlock(
                first_row=first,
                end_row=min(first + rows, end_row),
                first_frame=frame,
                frame_count=end_frame - frame,
                first_token_block=token_block,
                end_token_block=end_token_block,
            )
            for first in range(row, end_row, rows)
        ]
        frame, row, token_block = end_frame, end_row, end_token_block
    return torch.tensor(table, dtype=torch.int64).view(-1, len(RowBlock._fields))


@lru_cache(maxsize=64)
def _token_blocks(spans: Spans, frame_ends: tuple[int, ...], columns: int) -> Tensor:
    table = []
    frame = row = token = 0
    for _, end_frame, end_row in spans:
        for nth, end in enumerate(frame_ends[frame:end_frame]):
            table += [
                TokenBlock(
                    first_token=first, end_token=min(first + columns, end), frame=nth, first_row=row, end_row=end_row
                )
                for first in range(token, end, columns)
            ]
            token = end
        frame, row = end_frame, end_row
    return torch.tensor(table, dtype=torch.int64).view(-1, len(TokenBlock._fields))


def _row_of_token(problem: NormedProblem) -> Tensor:
    """int64 [N]: the row of each token, or -1."""
    rows = problem.rows.row_token
    token = torch.arange(problem.embeddings.shape[1], device=rows.device)
    if rows.shape[0] == 0:
        return torch.full_like(token, -1)
    nearest = torch.searchsorted(rows, token).clamp(max=rows.shape[0] - 1)
    return torch.where(rows[nearest] == token, nearest, -1)


def _target_start(index: MatchIndex, tokens: int) -> Tensor:
    """int64 [N + 1]: the matches with target k are `by_target[target_start[k] : target_start[k + 1]]`."""
    token = torch.arange(tokens + 1, device=index.target.device)
    return torch.searchsorted(index.target[index.by_target], token)


def _statistics_arguments(statistics: FrameStatistics, upstream: FrameUpstream) -> tuple[Tensor, ...]:
    """Kernel arguments from `lse` to `upstream_expected`."""
    tensors = (statistics.lse, statistics.known_lse, statistics.expected, *upstream)
    return tuple(tensor.contiguous() for tensor in tensors)
