"""The strategy for narrow embeddings: recomputes the similarities in each pass and never stores them.

The wide strategy (`chunked`) writes each similarity to memory and reads it back several times: 18 bytes of traffic
for every number, against 6 D operations. Below a width of a few hundred the traffic costs more than computing the
number again, and the accumulator of a whole row fits on chip. So

    statistics        per row and frame: lse, expected values, arg-max                  [L, A, P]
    loss_terms        both loss terms, and the gradients of lse and expected values
    row_gradient      gradient of each row, from the tokens of its sequence             float32 [g, A, D]
    token_gradient    gradient of each token, from the rows of its sequence             float32 [g, N, D]
    finish            both added, with the terms of the matches; projected; in the type of the embeddings

Five matrix products instead of three. The last three steps run for `g` layers at a time, as many as fit the
workspace, at least one; a float32 gradient tensor itself holds the token part. Without `weights` the strategy stops
after the second step. The temperature's gradient is `-(1 / tau) sum_i e_i . dA_i`, one number a row,
summed in a fixed order.

**Eligibility.** Embeddings of at most 512 bytes (D <= 256 in 16 bits: the accumulators fill the registers of two
warpgroups) in a type that tensor cores multiply: bfloat16, float16, or float32 where TF32 is allowed (D <= 128). IEEE
float32 products run on the ordinary cores, where the library's kernels are far better than Triton's: the wide strategy
computes those at any width.

This module implements `engines.Engine` with three functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import narrow_triton, rows_triton
from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchTerms, Problem, TermWeights
from .index import MatchIndex
from .narrow_triton import NormedProblem

WORKSPACE_BYTES = 96 << 20  # gradients of `g` layers; leaves room for statistics under 128 MiB


def eligible(embeddings: Tensor) -> bool:
    """Whether this strategy is the faster one. It is also correct for other types and widths, but slow."""
    on_tensor_cores = embeddings.dtype in (torch.bfloat16, torch.float16) or narrow_triton.tf32_allowed()
    return on_tensor_cores and embeddings.element_size() * embeddings.shape[-1] <= narrow_triton.MAX_EMBEDDING_BYTES


def terms_and_gradients(
    problem: Problem,
    index: MatchIndex,
    weights: TermWeights | None,  # [L, M]; with them, gradients are computed
    terms: MatchTerms,  # [L, M], written
    negatives: str,  # "sequence" | "frame"
    eps: float,
    gradient: Tensor | None,  # [L, N, D], written
    needs_temperature_gradient: bool,
) -> Tensor | None:
    """Both terms of every match; with `weights`, the gradients of `sum weights * terms`."""
    normed = NormedProblem.of(problem)
    statistics = narrow_triton.stream_statistics(normed, None if negatives == "sequence" else index.run_start)
    positive = narrow_triton.match_similarities(normed, index)
    runs = MatchRuns.of(index)
    upstream = rows_triton.loss_terms_from(positive, statistics, runs, weights, terms, negatives, eps)
    if upstream is None:
        return None
    return _gradients(normed, statistics, upstream, index, weights, gradient, needs_temperature_gradient)


def frame_match(problem: Problem) -> FrameStatistics:
    """[L, A, P] statistics of every row over every frame of its sequence; `best` is a token of the batch."""
    return narrow_triton.stream_statistics(NormedProblem.of(problem), None)


def frame_match_gradient(
    problem: Problem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    gradient: Tensor | None,  # [L, N, D], written
    needs_temperature_gradient: bool,
) -> Tensor | None:
    """The gradients of `sum upstream.lse * lse + sum upstream.expected * expected`."""
    return _gradients(NormedProblem.of(problem), statistics, upstream, None, None, gradient, needs_temperature_gradient)


def _gradients(
    problem: NormedProblem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    index: MatchIndex | None,
    weights: TermWeights | None,
    gradient: Tensor | None,
    needs_temperature_gradient: bool,
) -> Tensor | None:
    """Row gradients, then token gradients, for as many layers at a time as the workspace holds."""
    if gradient is None and not needs_temperature_gradient:
        return None
    layers, tokens, width = problem.embeddings.shape
    anchors = problem.rows.row_token.shape[0]
    in_place = gradient is None or gradient.dtype == torch.float32
    together = max(1, WORKSPACE_BYTES // max(1, 4 * width * (anchors + (0 if in_place else tokens))))
    boost = _boost(problem, upstream)
    radial = []  # e_i . dA_i of each row
    for start in range(0, layers, together):
        group = slice(start, min(start + together, layers))
        part, part_boost = problem.of_layers(group), boost[group]
        part_statistics = FrameStatistics(*(value[group] for value in statistics))
        part_upstream = FrameUpstream(*(value[group] for value in upstream))
        row_part = part.embeddings.new_empty(part.embeddings.shape[0], anchors, width, dtype=torch.float32)
        narrow_triton.stream_row_gradient(part, part_statistics, part_upstream, part_boost, row_part)
        out = token_part = None
        if gradient is not None:
            out = gradient[group]
            token_part = out if in_place else torch.empty_like(out, dtype=torch.float32)
            narrow_triton.stream_token_gradient(part, part_statistics, part_upstream, part_boost, token_part)
        part_weights = None if weights is None else weights.of_layers(group)
        radial.append(narrow_triton.finish_gradient(part, index, part_weights, row_part, token_part, out).flatten())
    return -torch.cat(radial).sum() / problem.temperature if needs_temperature_gradient else None


def _boost(problem: NormedProblem, upstream: FrameUpstream) -> Tensor:
    """A power of two for each layer, float32 [L], that brings the bound of `X` near 2^14, within the range of fp16.

    For normalised embeddings `|X| <= |a| + |b| (|v| + |E|)`, because probabilities are at most 1 and an expected value
    is at most the largest value. The other types have the range of float32 and need none.
    """
    layers = problem.embeddings.shape[0]
    if problem.embeddings.dtype != torch.float16:
        return torch.ones(layers, dtype=torch.float32, device=problem.embeddings.device)
    bound = _largest(upstream.lse)
    if problem.values is not None and problem.known is not None:
        values = torch.where(problem.known[:, None], problem.values, 0.0)
        bound = bound + 2 * _largest(upstream.expected.abs().sum(-1)) * _largest(values[None])
    return torch.exp2(14 - torch.ceil(torch.log2(bound.clamp(min=2.0**-100))))


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude in each layer, float32 [L]; 0 for a tensor without elements."""
    flat = values.abs().flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
