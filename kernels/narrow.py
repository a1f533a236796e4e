"""The strategy for narrow embeddings: similarities are made three times and kept never.

The wide strategy (`chunked`) writes each similarity to memory and reads it back several times: 18 bytes of traffic
for every number, against 6 D operations. Below a width of a few hundred the traffic costs more than making the
number again, and the accumulator of a whole row fits on chip. So

    statistics        per row and frame: lse, expected values, arg-max            [L, A, P]
    match_terms       both loss terms, and the gradients of lse and expected values
    row_gradient      what flows into each row from the tokens of its sequence    float32 [g, A, D]
    token_gradient    what flows into each token from the rows of its sequence    float32 [g, N, D]
    finish            both, and the pulls of matches; projected, in its own type

Five matrix products instead of three. The last three lines are for `g` layers at a time, as many as fit the
workspace, at least one; where the gradient itself is float32 it serves as the token part. Without `scales` it stops
after the second line. The temperature's gradient is `-(1 / tau) sum_i e_i . dA_i`, noted row by row and added up in a
fixed order.

**Eligibility.** Embeddings of at most 512 bytes (D <= 256 in 16 bits: the accumulators fill the registers of two
warpgroups) in a type that tensor cores multiply: bfloat16, float16, or float32 where TF32 is allowed (D <= 128). IEEE
float32 products run on the ordinary cores, where the library's kernels are far better than Triton's: those go the
wide way at any width.

Knows tensors, the plan, and no device: it offers the three functions of `engines.Engine`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import narrow_triton, rows_triton
from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchScales, MatchTerms
from .narrow_triton import Problem
from .plan import MatchPlan, RowPlan

WORKSPACE_BYTES = 96 << 20  # row gradients of the layers in flight; leaves room for statistics under 128 MiB


def eligible(embeddings: Tensor) -> bool:
    """Whether this strategy is the better one. It computes other types and widths too, only not well."""
    on_tensor_cores = embeddings.dtype in (torch.bfloat16, torch.float16) or narrow_triton.tf32_allowed()
    return on_tensor_cores and embeddings.element_size() * embeddings.shape[-1] <= narrow_triton.LONGEST


def match_terms(
    embeddings: Tensor,  # [L, N, D]
    plan: MatchPlan,
    temperature: Tensor,  # float32 []
    scales: MatchScales | None,  # [L, M]; with them, gradients are computed
    terms: MatchTerms,  # [L, M], filled in
    sequence_negatives: bool,
    eps: float,
    gradient: Tensor | None,  # like `embeddings`, filled in
    want_temperature: bool,
) -> Tensor | None:
    """Both terms of every match; with `scales`, the gradients of `sum scales * terms`."""
    problem = _problem(embeddings, plan.rows, temperature, plan.values, plan.known, exclude_own=True)
    statistics = narrow_triton.stream_statistics(problem, None if sequence_negatives else plan.run_start)
    positive = narrow_triton.positive_similarities(embeddings, problem.inverse_norm, plan, temperature)
    runs = MatchRuns(plan.run_start, plan.rows.longest, plan.order, plan.target, plan.depth, plan.counts, 0)
    upstream = rows_triton.match_terms_from(positive, statistics, runs, scales, terms, sequence_negatives, eps)
    if upstream is None:
        return None
    return _gradients(problem, statistics, upstream, plan, scales, gradient, want_temperature)


def frame_match(
    embeddings: Tensor,  # [L, N, D]
    rows: RowPlan,
    temperature: Tensor,  # float32 []
    values: Tensor | None,  # float32 [N, V]
    known: Tensor | None,  # bool [N]
    exclude_own: bool,
) -> FrameStatistics:
    """[L, A, P] statistics of every row over every frame of its sequence; `best` is a token of the batch."""
    problem = _problem(embeddings, rows, temperature, values, known, exclude_own)
    return narrow_triton.stream_statistics(problem, None)


def frame_match_gradient(
    embeddings: Tensor,
    rows: RowPlan,
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    gradient: Tensor | None,
    want_temperature: bool,
) -> Tensor | None:
    """The gradients of `sum upstream.lse * lse + sum upstream.expected * expected`."""
    problem = _problem(embeddings, rows, temperature, values, known, exclude_own)
    return _gradients(problem, statistics, upstream, None, None, gradient, want_temperature)


def _problem(
    embeddings: Tensor,
    rows: RowPlan,
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
) -> Problem:
    norms = rows_triton.inverse_norms(embeddings)
    return Problem(embeddings, norms, rows, temperature, values, known, exclude_own)


def _gradients(
    problem: Problem,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    plan: MatchPlan | None,
    scales: MatchScales | None,
    gradient: Tensor | None,
    want_temperature: bool,
) -> Tensor | None:
    """Rows, then tokens, for as many layers at a time as the workspace holds."""
    if gradient is None and not want_temperature:
        return None
    layers, tokens, width = problem.embeddings.shape
    anchors = problem.rows.row_token.shape[0]
    in_place = gradient is None or gradient.dtype == torch.float32
    together = max(1, WORKSPACE_BYTES // max(1, 4 * width * (anchors + (0 if in_place else tokens))))
    boost = _boost(problem, upstream)
    slopes = []
    for start in range(0, layers, together):
        end = min(start + together, layers)
        part = problem.layers(start, end)
        out = None if gradient is None else gradient[start:end]
        streamed = (
            part,
            FrameStatistics(*(value[start:end] for value in statistics)),
            FrameUpstream(*(value[start:end] for value in upstream)),
            boost[start:end],
        )
        row_part = problem.embeddings.new_empty(end - start, anchors, width, dtype=torch.float32)
        narrow_triton.stream_row_gradient(*streamed, row_part)
        token_part = out
        if out is not None:
            token_part = out if in_place else torch.empty_like(out, dtype=torch.float32)
            narrow_triton.stream_token_gradient(*streamed, token_part)
        weights = None if scales is None else MatchScales(*(value[start:end] for value in scales))
        slopes.append(narrow_triton.finish_gradient(part, plan, weights, row_part, token_part, out).flatten())
    return -torch.cat(slopes).sum() / problem.temperature if want_temperature else None


def _boost(problem: Problem, upstream: FrameUpstream) -> Tensor:
    """A power of two for each layer, float32 [L], that brings the bound of `X` near 2^14: what fp16 can hold.

    Over normalised embeddings `|X| <= |a| + |b| (|v| + |E|)`, for probabilities are at most 1 and an expected value
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
    """Largest magnitude in each layer, float32 [L]; 0 where there is nothing."""
    flat = values.abs().flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
