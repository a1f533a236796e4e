"""The row operations of `rows_torch`, fused, in Triton: for any width of embedding.

The matrix products of a chunk are left to the library. Between them, one pass reads the similarities for the
statistics and one reads them again and writes the gradient; a small launch before the first gathers what concerns
matches. The kernels are in `rows_kernels`, `gradient_kernels` and `vector_kernels`. This module launches them, with the
signatures and the meaning of `rows_torch`; each launch lists its arguments in the order of the kernel's signature.
Element types that are not part of a launch's `form` are those of `chunk`.

Rows of a chunk must be dense: their numbers, their norms and the values of a token lie together in memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import gradient_kernels as gradients
from . import rows_kernels as device
from . import vector_kernels as vectors
from .chunk import ChunkMatches, FrameStatistics, FrameUpstream, MatchTerms, RowChunk, TermWeights
from .triton_launch import Tile, cdiv, launch, power_of_two, tl

# The passes over similarities: 128 columns are 16 bytes a lane, where frames begin at multiples of 4. With one warp to
# a program no sum leaves it and nothing passes through shared memory (two warps: 1 to 3 instructions more for each
# similarity). Rows share the reads of norms, values and flags. Instructions for each similarity, and registers (sm_90):
#   statistics   2 rows 14.4, 80;   4 rows 12.5, 128: too few warps to cover the memory's latency
#   gradient     2 rows 15.4, 63;   4 rows 12.8, 72, but on an H100 half as fast again (36 against 23 microseconds for
#                512 rows of 13,824 columns)
# Where frames are few and long, one warp to a program is too little: more warps take as many columns each.
ROW_TILES = [Tile(rows=2, columns=128 * warps, warps=warps) for warps in (1, 2, 4, 8)]
ENOUGH_WARPS = 48 * 132  # in all programs: 48 for each multiprocessor of an H100
# Four rows with eight matches each fill a warp; an anchor has about as many matches as frames.
MATCH_TILE = Tile(rows=4, columns=8, warps=1)
# Rows of a matrix: 16 numbers a lane, and whole rows of up to 8,192 stay in registers.
LONGEST_ROW, NUMBERS_A_WARP = 8192, 512
NORM_TILE = Tile(rows=8, columns=256, warps=4)


def available() -> bool:
    return tl is not None


def inverse_norms(embeddings: Tensor) -> Tensor:
    """`1 / max(|e|, 1e-12)`: [..., N, D] of any float type -> float32 [..., N]."""
    stack = embeddings if embeddings.dim() == 3 else embeddings.reshape(-1, *embeddings.shape[-2:])  # [G, N, D]
    groups, tokens, width = stack.shape
    out = torch.empty(embeddings.shape[:-1], dtype=torch.float32, device=stack.device)
    strides = stack.stride()
    launch(
        vectors.inverse_norms, (cdiv(tokens, NORM_TILE.rows), groups), NORM_TILE,
        stack, *strides, out, tokens, width,
        form=(stack.dtype,),
        DENSE=strides[2] == 1, ALIGN=_alignment(width, stack) if strides[2] == 1 else 1,
    )  # fmt: skip
    return out


def frame_statistics(
    chunk: RowChunk, matches: ChunkMatches | None, previous: FrameStatistics | None
) -> FrameStatistics:
    """Log-sum-exp, expected value and arg-max of each row over each frame; writes `matches.positive`.

    Overwrites similarities that are left out. The memory of `previous` takes the result.
    """
    groups, rows, columns = chunk.similarity.shape
    frames, width = chunk.frame_offsets.shape[0] - 1, _value_width(chunk)
    ignored = matches is not None and matches.definition.ignores_targets
    similarity, runs = _similarity_arguments(chunk), _run_arguments(chunk, matches)
    own_column = chunk.own_column if chunk.exclude_own else None
    if matches is not None or own_column is not None:
        launch(
            device.prepare, (cdiv(rows, MATCH_TILE.rows), groups), MATCH_TILE,
            *similarity, own_column, *runs, rows, columns,
            form=(own_column is None, matches is None),
            IGNORED=ignored,
        )  # fmt: skip
    tile, statistics = _tile_of(chunk), previous
    if statistics is None:
        statistics = _empty_statistics(groups, rows, frames, width, ignored, chunk.similarity.device)
    launch(
        device.frame_statistics, (cdiv(rows, tile.rows) * frames, groups), tile,
        *similarity, *_value_arguments(chunk, width), *runs,
        *statistics[:5], statistics.negative_lse if ignored else None, rows, frames,
        form=(matches is None, ignored),
        VALUES=width, PADDED_VALUES=power_of_two(width),
        EVERY_FRAME=matches is None or matches.definition.every_frame, MERGED=previous is not None,
        ALIGN=_chunk_alignment(chunk),
    )  # fmt: skip
    return statistics


def loss_terms(
    statistics: FrameStatistics, matches: ChunkMatches, weights: TermWeights | None, terms: MatchTerms
) -> FrameUpstream | None:
    """Write both loss terms of every match of these rows; with `weights`, return the upstream gradients."""
    groups, rows, frames = statistics.lse.shape
    width, definition = statistics.expected.shape[-1], matches.definition
    upstream, pull = None, None if weights is None else matches.pull
    if pull is not None:
        upstream = FrameUpstream(torch.empty_like(statistics.lse), torch.empty_like(statistics.expected))
    tile = _frame_tile(frames)
    launch(
        gradients.loss_terms, (cdiv(rows, tile.rows), groups), tile,
        statistics.lse, statistics.negative_lse, statistics.expected, statistics.best, statistics.peak,
        matches.start, matches.longest, matches.order, matches.depth, matches.has_depth,
        matches.positive, matches.positive.stride(0),
        *((None, 0, 0, None, 0, 0) if weights is None else
          (weights.corr, *weights.corr.stride(), weights.depth, *weights.depth.stride())),
        *terms, terms.corr.stride(0),
        *((None, 0, None, None) if upstream is None or pull is None else (pull, pull.stride(0), *upstream)),
        rows, frames, float(definition.eps),
        form=(weights is None, upstream is None),
        VALUES=width, SEQUENCE_NEGATIVES=definition.every_frame, IGNORED=definition.ignores_targets,
    )  # fmt: skip
    return upstream


def similarity_gradient(
    chunk: RowChunk,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    matches: ChunkMatches | None,
    out: Tensor,  # [G, R, n], in the element type of the matrix products; may be `chunk.similarity` itself
) -> None:
    """Write `dL/dx`. With `matches`, each adds `matches.pull` at its target's column."""
    groups, rows, _ = chunk.similarity.shape
    frames, width = chunk.frame_offsets.shape[0] - 1, _value_width(chunk)
    start, longest, target, positive, positive_g, first_token = _run_arguments(chunk, matches)
    pull, tile = None if matches is None else matches.pull, _tile_of(chunk)
    launch(
        gradients.similarity_gradient, (cdiv(rows, tile.rows) * frames, groups), tile,
        *_similarity_arguments(chunk), chunk.own_column if chunk.exclude_own else None,
        *_value_arguments(chunk, width),
        statistics.negative_lse, statistics.known_lse, statistics.expected, *upstream,
        start, longest, target, positive, positive_g, pull, 0 if pull is None else pull.stride(0), first_token,
        out, *out.stride()[:2], rows, frames,
        form=(out.dtype, chunk.exclude_own, matches is None, pull is None),
        VALUES=width, IGNORED=matches is not None and matches.definition.ignores_targets,
        CLAMPED=out.dtype == torch.float16, ALIGN=_chunk_alignment(chunk, out),
    )  # fmt: skip


def gather_rows(source: Tensor, index: Tensor, out: Tensor) -> None:
    """`out = source[:, index]`: [G, n, D], [R] -> [G, R, D], in the element type of `out`."""
    groups, count, width = out.shape
    strides = source.stride()
    if strides[2] != 1:
        out.copy_(source.index_select(1, index))
        return
    tile = _row_tile(width)
    launch(
        vectors.gather_rows, (cdiv(count, tile.rows), cdiv(width, tile.columns), groups), tile,
        source, *strides[:2], index, out, *out.stride()[:2], count, width,
        form=(source.dtype, out.dtype),
        ALIGN=_alignment(width, source, out),
    )  # fmt: skip


def add_rows(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """`out[:, columns] += rows`: [G, R, D], [R], [G, n, D]. No column occurs twice."""
    groups, count, width = rows.shape
    tile = _row_tile(width)
    launch(
        vectors.add_rows, (cdiv(count, tile.rows), cdiv(width, tile.columns), groups), tile,
        rows, *rows.stride()[:2], columns, out, *out.stride()[:2], count, width,
        form=(rows.dtype, out.dtype),
        ALIGN=_alignment(width, rows, out),
    )  # fmt: skip


def project_gradient(gradient: Tensor, embeddings: Tensor, inverse_norm: Tensor, out: Tensor, of_unit: bool) -> None:
    """`out = u - e_hat (e_hat . u)`, in the element type of `out`; `gradient` [.., n, D] is `u`, and may be `out`."""
    if gradient.dim() == 2:
        gradient, embeddings, inverse_norm, out = (t[None] for t in (gradient, embeddings, inverse_norm, out))
    groups, tokens, width = gradient.shape
    tile, strides = _row_tile(width), embeddings.stride()
    launch(
        vectors.project_gradient, (cdiv(tokens, tile.rows), groups), tile,
        gradient, *gradient.stride()[:2], embeddings, *strides, inverse_norm, inverse_norm.stride(0),
        out, *out.stride()[:2], tokens, width,
        form=(gradient.dtype, embeddings.dtype, out.dtype),
        OF_UNIT=of_unit, CLAMPED=out.dtype == torch.float16, DENSE=strides[2] == 1,
        ALIGN=_alignment(width, gradient, embeddings, out) if strides[2] == 1 else 1, WHOLE=width <= tile.columns,
    )  # fmt: skip


def _empty_statistics(
    groups: int, rows: int, frames: int, width: int, ignored: bool, device: torch.device
) -> FrameStatistics:
    """Uninitialised memory for the statistics, which a kernel writes."""

    lse = torch.empty((groups, rows, frames), dtype=torch.float32, device=device)
    known_lse, peak = torch.empty_like(lse), torch.empty_like(lse)
    expected = lse.new_empty((groups, rows, frames, width))
    best = torch.empty_like(lse, dtype=torch.int64)
    return FrameStatistics(lse, known_lse, expected, best, peak, torch.empty_like(lse) if ignored else lse)


def _value_width(chunk: RowChunk) -> int:
    """V, the numbers attached to each token."""
    return 0 if chunk.values is None or chunk.known is None else chunk.values.shape[1]


def _similarity_arguments(chunk: RowChunk) -> tuple[Any, ...]:
    """Kernel arguments from `similarity` to `temperature`."""
    similarity, row_scale, token_scale = chunk.similarity, chunk.row_scale, chunk.token_scale
    pitch_g, pitch, _ = similarity.stride()
    return (
        similarity, pitch_g, pitch, row_scale, row_scale.stride(0), token_scale, token_scale.stride(0),
        chunk.temperature,
    )  # fmt: skip


def _value_arguments(chunk: RowChunk, width: int) -> tuple[Any, ...]:
    """Kernel arguments from `frame_offsets` to `known`."""
    if width == 0 or chunk.values is None:
        return chunk.frame_offsets, None, None
    return chunk.frame_offsets, chunk.values.contiguous(), chunk.known


def _run_arguments(chunk: RowChunk, matches: ChunkMatches | None) -> tuple[Any, ...]:
    """Kernel arguments from `run_start` to `first_token`."""
    if matches is None:
        return None, 0, None, None, 0, chunk.first_token
    positive = matches.positive
    return matches.start, matches.longest, matches.target, positive, positive.stride(0), chunk.first_token


@cache
def _frame_tile(frames: int) -> Tile:
    """One warp: 32 frames of two rows, or more frames of one."""
    columns = min(power_of_two(frames, least=32), 128)
    return Tile(rows=max(1, 64 // columns), columns=columns, warps=1)


def _tile_of(chunk: RowChunk) -> Tile:
    """The tile of a pass over similarities."""
    groups, rows, columns = chunk.similarity.shape
    frames = chunk.frame_offsets.shape[0] - 1
    return _tile_for(groups * rows * frames, columns // max(1, frames))


@cache
def _tile_for(cells: int, frame: int) -> Tile:
    """For so many pairs of a row and a frame, with frames of about so many columns."""
    fitting = [tile for tile in ROW_TILES if tile.columns <= frame] or ROW_TILES[:1]
    return next((tile for tile in fitting if cells // tile.rows * tile.warps >= ENOUGH_WARPS), fitting[-1])


@cache
def _row_tile(width: int) -> Tile:
    """Of a program that works on whole rows of a matrix."""
    columns = min(power_of_two(width, least=16), LONGEST_ROW)
    rows = max(1, 1024 // columns)
    return Tile(rows, columns, warps=max(1, min(16, rows * columns // NUMBERS_A_WARP)))


def _alignment(width: int, *matrices: Tensor) -> int:
    """The largest power of two up to 8 that divides the place of every row, counted in numbers."""
    bits = 8 | width
    for matrix in matrices:
        group, row, _ = matrix.stride()
        bits |= group | row | matrix.data_ptr() // matrix.element_size()
    return bits & -bits


def _chunk_alignment(chunk: RowChunk, *matrices: Tensor) -> int:
    """The same up to 4, for the rows of a chunk and of `matrices`, and for what belongs to its columns."""
    bits = 4 | chunk.multiple
    if bits & 1:
        return 1
    for matrix in (chunk.similarity, *matrices):
        group, row, _ = matrix.stride()
        bits |= group | row | matrix.data_ptr() // matrix.element_size()
    bits |= chunk.token_scale.stride(0) | chunk.token_scale.data_ptr() // 4
    if chunk.values is not None and chunk.known is not None:
        bits |= chunk.values.data_ptr() // 4 | chunk.known.data_ptr()
    return bits & -bits
