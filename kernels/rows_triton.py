"""The row operations of `rows_torch`, fused, in Triton: for any width of embedding.

The matrix products of a chunk are left to the library. Between them, one pass reads the similarities for the
statistics and one reads them again and writes the gradient. The kernels are in `rows_kernels`. This module launches
them, with the signatures and the meaning of `rows_torch`; each launch lists its arguments in the order of the kernel's
signature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rows_kernels as device
from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchTerms, RowChunk, TermWeights
from .triton_launch import Tile, cdiv, dense_inner, launch, power_of_two, tl

# These kernels move memory and are bound by it, on every architecture alike. Frames begin at any column, so loads are
# four bytes a lane, 128 in a row: a warp reads four full lines of a similarity row. With one warp to a program maxima
# and sums never leave it, no barrier is needed, and two rows share one read of norms, depths and flags. ptxas gives
# 60 to 95 registers (sm_90): 20 to 32 programs on a multiprocessor, whose 20 to 32 KiB of loads in flight cover the
# memory's latency. More rows a program cost more registers than they save reads.
ROW_TILE = Tile(rows=2, columns=128, warps=1)
# Embeddings are two bytes a number: 256 columns are one warp's 16-byte load a lane.
NORM_TILE = Tile(rows=8, columns=256, warps=4)
# One warp a row of the match table: 16 matches beside at most 128 frames, 2,048 comparisons in 64 registers a lane.
MATCHES_AT_ONCE, FRAMES_AT_ONCE = 16, 128


def available() -> bool:
    return tl is not None


def inverse_norms(embeddings: Tensor) -> Tensor:
    """`1 / max(|e|, 1e-12)`: [..., N, D] of any float type -> float32 [..., N]."""
    stack = embeddings.reshape(-1, *embeddings.shape[-2:])  # [G, N, D], a view of what the engine passes
    groups, tokens, width = stack.shape
    out = torch.empty(groups, tokens, dtype=torch.float32, device=stack.device)
    grid = (cdiv(tokens, NORM_TILE.rows), groups)
    launch(device.inverse_norms, grid, NORM_TILE, stack, *stack.stride(), out, tokens, width)
    return out.view(embeddings.shape[:-1])


def frame_statistics(chunk: RowChunk, runs: MatchRuns | None, every_frame: bool) -> FrameStatistics:
    """Log-sum-exp, expected value and arg-max of each row over each frame."""
    groups, rows, _ = chunk.similarity.shape
    frames, width = chunk.frame_offsets.shape[0] - 1, value_width(chunk.values, chunk.known)
    statistics = empty_statistics(groups, rows, frames, width, chunk.similarity.device)
    launch(
        device.frame_statistics, (cdiv(rows, ROW_TILE.rows) * frames, groups), ROW_TILE,
        *_similarity_arguments(chunk), *_token_arguments(chunk),
        *((None, None) if runs is None else (runs.start, runs.longest)),
        *statistics, rows, frames,
        VALUES=width, PADDED_VALUES=power_of_two(width), EVERY_FRAME=every_frame or runs is None,
    )  # fmt: skip
    return statistics


def loss_terms(
    chunk: RowChunk,
    statistics: FrameStatistics,
    runs: MatchRuns,
    weights: TermWeights | None,
    terms: MatchTerms,
    negatives: str,
    eps: float,
) -> FrameUpstream | None:
    """Fill in both loss terms of every match of these rows; with `weights`, also the upstream gradients."""
    source = (*_similarity_arguments(chunk), None, None)
    return _loss_terms(source, statistics, runs, weights, terms, negatives, eps)


def loss_terms_from(
    positive: Tensor,  # float32 [G, M], sorted: scaled similarity of each match
    statistics: FrameStatistics,
    runs: MatchRuns,
    weights: TermWeights | None,
    terms: MatchTerms,
    negatives: str,
    eps: float,
) -> FrameUpstream | None:
    """The same from the similarities of the matches alone, and from the statistics of all rows."""
    source = (*(None,) * 9, positive, positive.stride(0))
    return _loss_terms(source, statistics, runs, weights, terms, negatives, eps)


def _loss_terms(
    source: tuple[Any, ...],  # the kernel's arguments from `similarity` to `positive_g`
    statistics: FrameStatistics,
    runs: MatchRuns,
    weights: TermWeights | None,
    terms: MatchTerms,
    negatives: str,
    eps: float,
) -> FrameUpstream | None:
    groups, rows, frames = statistics.lse.shape
    upstream = None
    if weights is not None:
        upstream = FrameUpstream(torch.empty_like(statistics.lse), torch.empty_like(statistics.expected))
    launch(
        device.loss_terms, (rows, groups), Tile(MATCHES_AT_ONCE, min(power_of_two(frames), FRAMES_AT_ONCE), warps=1),
        *source, statistics.lse, statistics.expected, statistics.best, statistics.peak,
        runs.start, runs.longest, runs.order, runs.target, runs.depth, runs.has_depth, runs.first_token,
        *((None,) * 6 if weights is None else
          (weights.corr, *weights.corr.stride(), weights.depth, *weights.depth.stride())),
        *terms, terms.corr.stride(0), *((None, None) if upstream is None else upstream), rows, frames, eps,
        VALUES=statistics.expected.shape[-1], SEQUENCE_NEGATIVES=negatives == "sequence",
    )  # fmt: skip
    return upstream


def similarity_gradient(
    chunk: RowChunk,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    runs: MatchRuns | None,
    weights: TermWeights | None,
    out: Tensor,  # [G, R, n], in the element type of the matrix products; may be `chunk.similarity` itself
) -> None:
    """Write `dL/dx`. With `runs`, each match adds its positive's gradient: `-weight` at its target's column."""
    groups, rows, _ = chunk.similarity.shape
    frames = chunk.frame_offsets.shape[0] - 1
    launch(
        device.similarity_gradient, (cdiv(rows, ROW_TILE.rows) * frames, groups), ROW_TILE,
        *_similarity_arguments(chunk), *_token_arguments(chunk),
        statistics.lse, statistics.known_lse, statistics.expected, *upstream,
        *((None,) * 8 if runs is None or weights is None else
          (runs.start, runs.longest, runs.order, runs.target, runs.first_token, weights.corr, *weights.corr.stride())),
        out, *out.stride(), rows, frames, torch.finfo(out.dtype).max,
        VALUES=value_width(chunk.values, chunk.known),
    )  # fmt: skip


def project_gradient(gradient: Tensor, embeddings: Tensor, inverse_norm: Tensor, out: Tensor) -> None:
    """`out = u - e_hat (e_hat . u)`, in the element type of `out`; `gradient` [.., n, D] is `u`, and may be `out`."""
    if gradient.dim() == 2:
        gradient, embeddings, inverse_norm, out = (t[None] for t in (gradient, embeddings, inverse_norm, out))
    groups, tokens, width = gradient.shape
    inverse_norm = dense_inner(inverse_norm)
    launch(
        device.project_gradient, (cdiv(tokens, NORM_TILE.rows), groups), NORM_TILE,
        gradient, *gradient.stride(), embeddings, *embeddings.stride(), inverse_norm, inverse_norm.stride(0),
        out, *out.stride(), tokens, width, torch.finfo(out.dtype).max,
    )  # fmt: skip


def empty_statistics(groups: int, rows: int, frames: int, width: int, device: torch.device) -> FrameStatistics:
    """Uninitialised memory for the statistics, which a kernel writes."""

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    shape = (groups, rows, frames)
    best = torch.empty(shape, dtype=torch.int64, device=device)
    return FrameStatistics(floats(*shape), floats(*shape), floats(*shape, width), best, floats(*shape))


def value_width(values: Tensor | None, known: Tensor | None) -> int:
    """V, the numbers attached to each token."""
    return 0 if values is None or known is None else values.shape[1]


def _similarity_arguments(chunk: RowChunk) -> tuple[Any, ...]:
    """Kernel arguments from `similarity` to `temperature`."""
    row_scale, token_scale = dense_inner(chunk.row_scale), dense_inner(chunk.token_scale)
    return (
        chunk.similarity, *chunk.similarity.stride(),
        row_scale, row_scale.stride(0), token_scale, token_scale.stride(0), chunk.temperature,
    )  # fmt: skip


def _token_arguments(chunk: RowChunk) -> tuple[Any, ...]:
    """Kernel arguments from `own_token` to `known`."""
    own_token = chunk.own_token if chunk.exclude_own else None
    if chunk.values is None or chunk.known is None:
        return own_token, chunk.frame_offsets, None, None, None
    values = dense_inner(chunk.values)
    return own_token, chunk.frame_offsets, values, values.stride(0), chunk.known
