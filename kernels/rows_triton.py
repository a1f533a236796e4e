"""The row operations of `rows_torch`, fused, in Triton: for any width of embedding.

The matrix products of a chunk are left to the library. Between them, one pass reads the similarities for the
statistics and one reads them again and writes the gradient. The kernels are in `rows_kernels`, `gradient_kernels`,
`fold_kernels` and `vector_kernels`. This module launches them, with the signatures and the meaning of `rows_torch`;
each launch lists its arguments in the order of the kernel's signature.
Element types that are not part of a launch's `form` are those of `chunk`.

Rows of a chunk must be dense: their numbers, their norms and the values of a token lie together in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import fold_kernels as folding
from . import gradient_kernels as gradients
from . import rows_kernels as device
from . import vector_kernels as vectors
from .chunk import (
    AddedRows,
    ChunkMatches,
    FrameStatistics,
    FrameUpstream,
    MatchTerms,
    PartMemory,
    RowChunk,
    TermWeights,
)
from .replay import scratch
from .triton_launch import Tile, cdiv, launch, power_of_two, tl

# The passes over similarities: 128 columns are 16 bytes a lane, where frames begin at multiples of 4. With one warp to
# a program no sum leaves it and nothing passes through shared memory (two warps: 1 to 3 instructions more for each
# similarity). Rows share the reads of norms, values and flags. Instructions for each similarity, and registers (sm_90):
#   statistics   2 rows 11.8, 64;   4 rows 10.4, 91: too few warps to cover the memory's latency
#   gradient     2 rows 12.3, 64;   4 rows 10.7, 80; in an earlier form, of 15.3 and 12.8 instructions, four rows took
#                half as long again on an H100 (36 against 23 microseconds for 512 rows of 13,824 columns)
# Where frames are few and long, one warp to a program is too little: more warps take as many columns each.
ROW_TILES = [Tile(rows=2, columns=128 * warps, warps=warps) for warps in (1, 2, 4, 8)]
ENOUGH_WARPS = 48 * 132  # in all programs: 48 for each multiprocessor of an H100
# Rows of a matrix: 16 numbers a lane, and whole rows of up to 8,192 stay in registers.
LONGEST_ROW, NUMBERS_A_WARP = 8192, 512
NORM_TILE = Tile(rows=8, columns=256, warps=4)
# Folding `X`: two squares of it in registers, 16 numbers a thread each; and lines of columns that lie apart.
PAIR_TILE, COLUMN_TILE = Tile(rows=64, columns=64, warps=8), Tile(rows=8, columns=256, warps=4)


def available() -> bool:
    return tl is not None


def inverse_norms(embeddings: Tensor, duals: Tensor | None = None) -> Tensor:
    """`1 / max(|e|, 1e-12)`: [..., N, D] of any float type -> float32 [..., N]. The numbers of a dual lie together."""
    stack = embeddings if embeddings.dim() == 3 else embeddings.reshape(-1, *embeddings.shape[-2:])  # [G, N, D]
    out = scratch(torch.empty(embeddings.shape[:-1], dtype=torch.float32, device=stack.device))
    _launch_norms(stack, duals, out, None, None, None)
    return out


def norms_and_rows(
    tokens: Tensor,
    duals: Tensor | None,
    own: Tensor,
    row_of: Tensor,
    norms: Tensor,
    of_rows: Tensor,
    anchors: Tensor | None,
) -> None:
    """The inverse norms of tokens and of those that are rows; with `anchors`, these are copied, in the same pass."""
    if anchors is not None and tokens.stride(2) != 1:
        gather_rows(tokens, own, anchors)
        anchors = None
    _launch_norms(tokens, duals, norms, row_of, of_rows, anchors)


def _launch_norms(
    stack: Tensor,
    duals: Tensor | None,
    out: Tensor,
    row_of: Tensor | None,
    of_rows: Tensor | None,
    anchors: Tensor | None,
) -> None:
    groups, tokens, width = stack.shape
    strides, matrices = stack.stride(), [matrix for matrix in (stack, duals, anchors) if matrix is not None]
    launch(
        vectors.inverse_norms, (cdiv(tokens, NORM_TILE.rows), groups), NORM_TILE,
        stack, *strides, *_dual_arguments(duals),
        row_of, out, of_rows, 0 if of_rows is None else of_rows.stride(0), anchors,
        *((0, 0) if anchors is None else anchors.stride()[:2]), tokens, width,
        form=(stack.dtype, duals is None, row_of is None, None if anchors is None else anchors.dtype),
        DENSE=strides[2] == 1, ALIGN=_alignment(width, *matrices) if strides[2] == 1 else 1,
    )  # fmt: skip


def frame_statistics(
    chunk: RowChunk,
    matches: ChunkMatches | None,
    previous: FrameStatistics | None,
    memory: PartMemory | None = None,
) -> FrameStatistics:
    """Log-sum-exp, expected value and arg-max of each row over each frame; writes `matches.positive`.

    Overwrites similarities that are left out. The memory of `previous` takes the result.
    """
    shared = _Shared.of(chunk)
    groups, rows, frames, width = shared.sizes
    ignored = matches is not None and matches.definition.ignores_targets
    memory = memory or PartMemory()
    statistics = previous or memory.statistics
    if statistics is None:
        statistics = memory.statistics = _empty_statistics(chunk.similarity, (groups, rows, frames), width, ignored)
    launch(
        device.frame_statistics, shared.grid, shared.tile,
        *shared.similarity, *shared.columns, *_run_arguments(matches),
        *statistics[:5], statistics.negative_lse if ignored else None, rows, frames,
        form=(chunk.exclude_own, matches is None, ignored),
        VALUES=width, PADDED_VALUES=power_of_two(width),
        EVERY_FRAME=matches is None or matches.definition.every_frame, MERGED=previous is not None,
        ALIGN=shared.align,
    )  # fmt: skip
    return statistics


def loss_terms(
    statistics: FrameStatistics,
    matches: ChunkMatches,
    weights: TermWeights | None,
    terms: MatchTerms,
    memory: PartMemory | None = None,
) -> FrameUpstream | None:
    """Write both loss terms of every match of these rows; with `weights`, return the upstream gradients."""
    groups, rows, frames = statistics.lse.shape
    width, definition = statistics.expected.shape[-1], matches.definition
    upstream, pull = None, None if weights is None else matches.pull
    if pull is not None:
        memory = memory or PartMemory()
        upstream = memory.upstream
        if upstream is None:
            upstream = FrameUpstream(
                *(scratch(torch.empty_like(value)) for value in (statistics.lse, statistics.expected))
            )
            memory.upstream = upstream
    tile = _frame_tile(frames)
    launch(
        gradients.loss_terms, (cdiv(rows, tile.rows), groups, 1), tile,
        statistics.lse, statistics.negative_lse, statistics.expected, statistics.best, statistics.peak,
        matches.start, matches.longest, matches.order, matches.depth, matches.has_depth,
        matches.positive, matches.positive.stride()[0],
        *((None, 0, 0, None, 0, 0) if weights is None else
          (weights.corr, *weights.corr.stride(), weights.depth, *weights.depth.stride())),
        *terms, terms.corr.stride()[0],
        *((None, 0, None, None) if upstream is None or pull is None else (pull, pull.stride()[0], *upstream)),
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
    shared = _Shared.of(chunk)
    _, rows, frames, width = shared.sizes
    pull, element = None if matches is None else matches.pull, out.dtype
    out_g, out_pitch, _ = out.stride()
    places = shared.align | _places(out)
    launch(
        gradients.similarity_gradient, shared.grid, shared.tile,
        *shared.similarity, *shared.columns,
        statistics.negative_lse, statistics.known_lse, statistics.expected, *upstream,
        *_run_arguments(matches), pull, 0 if pull is None else pull.stride()[0],
        out, out_g, out_pitch, rows, frames,
        form=(element, chunk.exclude_own, matches is None, pull is None),
        VALUES=width, IGNORED=matches is not None and matches.definition.ignores_targets,
        CLAMPED=element == torch.float16, ALIGN=places & -places,
    )  # fmt: skip


def fold(x: Tensor, own: Tensor, row_of: Tensor, others: Tensor, rest: Tensor) -> None:
    """Add what is between two rows, both ways, and copy the other columns to `rest` [G, R, n - R]."""
    groups, rows, left = rest.shape
    columns = x.shape[2]
    runs = cdiv(columns, PAIR_TILE.columns)
    launch(
        folding.add_transposed, (runs, runs, groups), PAIR_TILE,
        x, *x.stride()[:2], row_of, columns,
        form=(x.dtype,),
        CLAMPED=x.dtype == torch.float16, ALIGN=_alignment(columns, x),
    )  # fmt: skip
    launch(
        folding.gather_columns, (cdiv(left, COLUMN_TILE.columns), cdiv(rows, COLUMN_TILE.rows), groups), COLUMN_TILE,
        x, *x.stride()[:2], others, rest, *rest.stride()[:2], rows, left,
        form=(x.dtype,),
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


def project_gradient(
    gradient: Tensor,
    embeddings: Tensor,
    inverse_norm: Tensor,
    out: Tensor,
    of_unit: bool,
    factor: Tensor | None = None,
    added: AddedRows | None = None,
    tokens: Tensor | None = None,
    duals: Tensor | None = None,
) -> None:
    """`out = u - e_hat (e_hat . u)`, in the element type of `out`, with `u = factor (gradient + added)` [G, n, D].

    With `tokens`, the gradient is that of these alone. With `duals`, the product is with a normalised dual.
    """
    groups, count, width = gradient.shape
    tile, strides = _row_tile(width), embeddings.stride()
    matrices = [gradient, embeddings, out]
    matrices += [] if added is None else [added.rows]
    matrices += [] if duals is None else [duals]
    launch(
        vectors.project_gradient, (cdiv(count, tile.rows), groups), tile,
        gradient, *gradient.stride()[:2], embeddings, *strides, inverse_norm, inverse_norm.stride(0), factor,
        *((None, 0, 0, None, 0) if added is None else (added.rows, *added.rows.stride()[:2], *added[1:])),
        tokens, *_dual_arguments(duals), out, *out.stride()[:2], count, width,
        form=(
            gradient.dtype, embeddings.dtype, out.dtype, factor is None, added is None, tokens is None, duals is None,
        ),
        OF_UNIT=of_unit, CLAMPED=out.dtype == torch.float16, DENSE=strides[2] == 1,
        ALIGN=_alignment(width, *matrices) if strides[2] == 1 else 1, WHOLE=width <= tile.columns,
    )  # fmt: skip


def _dual_arguments(duals: Tensor | None) -> tuple[Any, ...]:
    """Kernel arguments from `duals` to `duals_n`."""
    return (None, 0, 0) if duals is None else (duals, *duals.stride()[:2])


def _empty_statistics(like: Tensor, cells: tuple[int, int, int], width: int, ignored: bool) -> FrameStatistics:
    """Uninitialised memory for the statistics, which a kernel writes."""

    def memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return scratch(like.new_empty((*cells, *shape), dtype=dtype))

    lse = memory()
    negative_lse = memory() if ignored else lse
    return FrameStatistics(lse, memory(), memory(width), memory(dtype=torch.int64), memory(), negative_lse)


@dataclass(slots=True)
class _Shared:
    """What the launches for a chunk have in common. Only the norms change, from one layer to the next."""

    sizes: tuple[int, int, int, int]  # G, R, P, V
    similarity: tuple[Any, ...]  # kernel arguments from `similarity` to `temperature`
    columns: tuple[Any, ...]  # kernel arguments from `row_token` to `known`
    tile: Tile  # of a pass over similarities
    grid: tuple[int, int, int]
    places: int  # of all but `token_scale`; see `_places`
    align: int  # the largest power of two that divides the places of all

    @staticmethod
    def of(chunk: RowChunk) -> _Shared:
        shared = chunk.launches
        if shared is None:
            shared = chunk.launches = _Shared._prepared(chunk)
        elif shared.similarity[3] is not chunk.row_scale or shared.similarity[5] is not chunk.token_scale:
            shared.similarity, shared.align = _similarity_arguments(chunk), _aligned(chunk, shared.places)
        return shared

    @staticmethod
    def _prepared(chunk: RowChunk) -> _Shared:
        values, known = chunk.values, chunk.known
        groups, rows, columns = chunk.similarity.shape
        frames = chunk.frame_offsets.shape[0] - 1
        width, places = 0, 4 | chunk.multiple | _places(chunk.similarity)
        if values is not None and known is not None:
            values = values.contiguous()
            width, places = values.shape[1], places | values.data_ptr() // 4 | known.data_ptr() // 4
        tile = _cached_tile(groups * rows * frames, columns // max(1, frames))
        return _Shared(
            (groups, rows, frames, width), _similarity_arguments(chunk),
            (chunk.row_token if chunk.exclude_own else None, chunk.first_token, chunk.frame_offsets,
             chunk.first_column, columns, *((values, known) if width else (None, None))),
            tile, (frames, cdiv(rows, tile.rows), groups), places, _aligned(chunk, places),
        )  # fmt: skip


def _similarity_arguments(chunk: RowChunk) -> tuple[Any, ...]:
    """Kernel arguments from `similarity` to `temperature`."""
    similarity, row_scale, token_scale = chunk.similarity, chunk.row_scale, chunk.token_scale
    pitch_g, pitch, _ = similarity.stride()
    row_scale_g, _ = row_scale.stride()
    token_scale_g, _ = token_scale.stride()
    return similarity, pitch_g, pitch, row_scale, row_scale_g, token_scale, token_scale_g, chunk.temperature


def _aligned(chunk: RowChunk, places: int) -> int:
    """The largest power of two that divides `places` and those of `token_scale`."""
    places |= chunk.token_scale.stride()[0] | chunk.token_scale.data_ptr() // 4
    return places & -places


def _run_arguments(matches: ChunkMatches | None) -> tuple[Any, ...]:
    """Kernel arguments from `run_start` to `positive_g`."""
    if matches is None:
        return None, 0, None, None, 0
    positive = matches.positive
    return matches.start, matches.longest, matches.target, positive, positive.stride()[0]


@cache
def _frame_tile(frames: int) -> Tile:
    """One warp: 32 frames of two rows, or more frames of one."""
    columns = min(power_of_two(frames, least=32), 128)
    return Tile(rows=max(1, 64 // columns), columns=columns, warps=1)


def tile_for(cells: int, frame: int) -> Tile:
    """For so many pairs of a row and a frame, with frames of about so many columns."""
    fitting = [tile for tile in ROW_TILES if tile.columns <= frame] or ROW_TILES[:1]
    return next((tile for tile in fitting if cells // tile.rows * tile.warps >= ENOUGH_WARPS), fitting[-1])


_cached_tile = cache(tile_for)


@cache
def _row_tile(width: int) -> Tile:
    """Of a program that works on whole rows of a matrix."""
    columns = min(power_of_two(width, least=16), LONGEST_ROW)
    rows = max(1, 1024 // columns)
    return Tile(rows, columns, warps=max(1, min(16, rows * columns // NUMBERS_A_WARP)))


def _alignment(width: int, *matrices: Tensor) -> int:
    """The largest power of two up to 8 that divides the place of every row, counted in numbers."""
    places = 8 | width
    for matrix in matrices:
        group, row, _ = matrix.stride()
        places |= group | row | matrix.data_ptr() // matrix.element_size()
    return places & -places


def _places(matrix: Tensor) -> int:
    """A number that a power of two divides if and only if it divides the place of every row, counted in numbers."""
    group, row, _ = matrix.stride()
    return group | row | matrix.data_ptr() // matrix.element_size()
