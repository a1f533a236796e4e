"""The row operations of `rows_torch`, fused, in Triton: for any width of embedding.

The two matrix products of a chunk are left to the library; what stands between them is done in one pass over the
similarities for the statistics and one for the gradient, each reading and writing every number once. The kernels are
in `rows_kernels`; here are their launches, with the signatures and the meaning of `rows_torch`. Tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows_kernels as device
from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchScales, MatchTerms, RowChunk
from .triton_launch import Tile, cdiv, dense_inner, launch, power_of_two, tl

# These kernels move memory and are bound by it, on every architecture alike. Frames begin at any column, so loads are
# four bytes a lane, 128 in a row: a warp reads four full lines of a similarity row. With one warp to a program maxima
# and sums never leave it, no barrier is ever met, and two rows share one read of norms, depths and flags. ptxas gives
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
    arguments = {"embeddings": stack, **strides("stride", stack, "gnd"), "out": out, "tokens": tokens, "width": width}
    launch(device.inverse_norms, (cdiv(tokens, NORM_TILE.rows), groups), NORM_TILE, arguments, written=("out",))
    return out.view(embeddings.shape[:-1])


def frame_statistics(chunk: RowChunk, runs: MatchRuns | None, every_frame: bool) -> FrameStatistics:
    """Log-sum-exp, expected value and arg-max of each row over each frame."""
    groups, rows, _ = chunk.similarity.shape
    frames, width = chunk.frame_offsets.shape[0] - 1, value_width(chunk.values, chunk.known)
    statistics = unwritten_statistics(groups, rows, frames, width, chunk.similarity.device)
    arguments = {
        **_chunk_arguments(chunk),
        "run_start": chunk.own_token if runs is None else runs.start,
        "longest": 0 if runs is None else runs.longest,
        **statistics._asdict(),
        "rows": rows,
        "frames": frames,
        "PADDED_WIDTH": power_of_two(width),
        "BY_RUN": runs is not None,
        "EVERY_FRAME": every_frame or runs is None,
    }
    grid = (cdiv(rows, ROW_TILE.rows) * frames, groups)
    launch(device.frame_statistics, grid, ROW_TILE, arguments, written=FrameStatistics._fields)
    return statistics


def match_terms(
    chunk: RowChunk,
    statistics: FrameStatistics,
    runs: MatchRuns,
    scales: MatchScales | None,
    terms: MatchTerms,
    sequence_negatives: bool,
    eps: float,
) -> FrameUpstream | None:
    """Fill in both loss terms of every match of these rows; with `scales`, also the upstream gradients."""
    where = {
        "similarity": chunk.similarity,
        **strides("stride", chunk.similarity, "grn"),
        **_scale_arguments(chunk),
        "positive": chunk.similarity,
        "positive_g": 0,
        "POSITIVE_GIVEN": False,
    }
    return _launch_match_terms(where, statistics, runs, scales, terms, sequence_negatives, eps)


def match_terms_from(
    positive: Tensor,  # float32 [G, M], sorted: scaled similarity of each match
    statistics: FrameStatistics,
    runs: MatchRuns,
    scales: MatchScales | None,
    terms: MatchTerms,
    sequence_negatives: bool,
    eps: float,
) -> FrameUpstream | None:
    """The same where no similarities are kept: each match's own is given, the statistics are those of all rows."""
    nothing = dict.fromkeys(("stride_g", "stride_r", "stride_n", "row_scale_g", "token_scale_g"), 0)
    unread = dict.fromkeys(("similarity", "row_scale", "token_scale", "temperature"), statistics.lse)
    where = {**nothing, **unread, "positive": positive, "positive_g": positive.stride(0), "POSITIVE_GIVEN": True}
    return _launch_match_terms(where, statistics, runs, scales, terms, sequence_negatives, eps)


def similarity_gradient(
    chunk: RowChunk,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    runs: MatchRuns | None,
    scales: MatchScales | None,
    out: Tensor,  # [G, R, n], the element type that the matrix products want; may be `chunk.similarity` itself
) -> None:
    """Write `dL/dx`. With `runs`, each match also pulls its target: `-scale` at its column."""
    groups, rows, _ = chunk.similarity.shape
    frames = chunk.frame_offsets.shape[0] - 1
    arguments = {
        **_chunk_arguments(chunk),
        "lse": statistics.lse,
        "known_lse": statistics.known_lse,
        "expected": statistics.expected,
        "upstream_lse": upstream.lse,
        "upstream_expected": upstream.expected,
        **_pull_arguments(runs, scales, unread=chunk.own_token),
        "out": out,
        **strides("out", out, "grn"),
        "rows": rows,
        "frames": frames,
        "limit": torch.finfo(out.dtype).max,
    }
    launch(device.similarity_gradient, (cdiv(rows, ROW_TILE.rows) * frames, groups), ROW_TILE, arguments, ("out",))


def project_gradient(gradient: Tensor, embeddings: Tensor, inverse_norm: Tensor, out: Tensor) -> None:
    """`out = u - e_hat (e_hat . u)`, in the element type of `out`; `gradient` [.., n, D] is `u`, and may be `out`."""
    if gradient.dim() == 2:
        gradient, embeddings, inverse_norm, out = (t[None] for t in (gradient, embeddings, inverse_norm, out))
    groups, tokens, width = gradient.shape
    inverse_norm = dense_inner(inverse_norm)
    arguments = {
        "gradient": gradient,
        **strides("gradient", gradient, "gnd"),
        "embeddings": embeddings,
        **strides("stride", embeddings, "gnd"),
        "inverse_norm": inverse_norm,
        "inverse_g": inverse_norm.stride(0),
        "out": out,
        **strides("out", out, "gnd"),
        "tokens": tokens,
        "width": width,
        "limit": torch.finfo(out.dtype).max,
    }
    launch(device.project_gradient, (cdiv(tokens, NORM_TILE.rows), groups), NORM_TILE, arguments, written=("out",))


def unwritten_statistics(groups: int, rows: int, frames: int, width: int, device: torch.device) -> FrameStatistics:
    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    shape = (groups, rows, frames)
    best = torch.empty(shape, dtype=torch.int64, device=device)
    return FrameStatistics(floats(*shape), floats(*shape), floats(*shape, width), best, floats(*shape))


def value_width(values: Tensor | None, known: Tensor | None) -> int:
    return 0 if values is None or known is None else values.shape[1]


def strides(name: str, tensor: Tensor, dimensions: str) -> dict[str, int]:
    """`{"out_g": .., "out_r": ..}`: a kernel's stride arguments."""
    return {f"{name}_{letter}": tensor.stride(i) for i, letter in enumerate(dimensions)}


def _launch_match_terms(
    where: dict, statistics: FrameStatistics, runs: MatchRuns, scales: MatchScales | None, terms: MatchTerms,
    sequence_negatives: bool, eps: float,
) -> FrameUpstream | None:  # fmt: skip
    groups, rows, frames = statistics.lse.shape
    upstream = None
    if scales is not None:
        upstream = FrameUpstream(torch.empty_like(statistics.lse), torch.empty_like(statistics.expected))
    corr_scale, depth_scale = (terms.corr, terms.depth) if scales is None else (scales.corr, scales.depth)
    arguments = {
        **where,
        "lse": statistics.lse,
        "known_expected": statistics.expected,
        "best": statistics.best,
        "peak": statistics.peak,
        "run_start": runs.start,
        "longest": runs.longest,
        "order": runs.order,
        "target": runs.target,
        "depth": runs.depth,
        "counts": runs.counts,
        "first_token": runs.first_token,
        "corr_scale": corr_scale,
        **strides("corr_scale", corr_scale, "gm"),
        "depth_scale": depth_scale,
        **strides("depth_scale", depth_scale, "gm"),
        "corr_term": terms.corr,
        "depth_term": terms.depth,
        "best_term": terms.best,
        "confidence_term": terms.confidence,
        "term_g": terms.corr.stride(0),
        "upstream_lse": statistics.lse if upstream is None else upstream.lse,
        "upstream_expected": statistics.lse if upstream is None else upstream.expected,
        "rows": rows,
        "frames": frames,
        "eps": eps,
        "WIDTH": statistics.expected.shape[-1],
        "SEQUENCE_NEGATIVES": sequence_negatives,
        "WITH_SCALES": scales is not None,
    }
    tile = Tile(rows=MATCHES_AT_ONCE, columns=min(power_of_two(frames), FRAMES_AT_ONCE), warps=1)
    written = ("corr_term", "depth_term", "best_term", "confidence_term", "upstream_lse", "upstream_expected")
    launch(device.match_terms, (rows, groups), tile, arguments, written if scales is not None else written[:4])
    return upstream


def _pull_arguments(runs: MatchRuns | None, scales: MatchScales | None, unread: Tensor) -> dict:
    if runs is None or scales is None:
        numbers = dict.fromkeys(("longest", "first_token", "corr_scale_g", "corr_scale_m"), 0)
        return dict.fromkeys(("run_start", "order", "target", "corr_scale"), unread) | numbers | {"WITH_MATCHES": False}
    return {
        "run_start": runs.start,
        "longest": runs.longest,
        "order": runs.order,
        "target": runs.target,
        "first_token": runs.first_token,
        "corr_scale": scales.corr,
        **strides("corr_scale", scales.corr, "gm"),
        "WITH_MATCHES": True,
    }


def _chunk_arguments(chunk: RowChunk) -> dict:
    width = value_width(chunk.values, chunk.known)
    values = chunk.row_scale[..., None] if chunk.values is None else dense_inner(chunk.values)
    return {
        "similarity": chunk.similarity,
        **strides("stride", chunk.similarity, "grn"),
        **_scale_arguments(chunk),
        "own_token": chunk.own_token,
        "frame_offsets": chunk.frame_offsets,
        "values": values,
        "values_n": values.stride(-2),
        "known": chunk.own_token if width == 0 else chunk.known,
        "EXCLUDE_OWN": chunk.exclude_own,
        "WIDTH": width,
    }


def _scale_arguments(chunk: RowChunk) -> dict:
    row_scale, token_scale = dense_inner(chunk.row_scale), dense_inner(chunk.token_scale)
    return {
        "row_scale": row_scale,
        "row_scale_g": row_scale.stride(0),
        "token_scale": token_scale,
        "token_scale_g": token_scale.stride(0),
        "temperature": chunk.temperature,
    }
