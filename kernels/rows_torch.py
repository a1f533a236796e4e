"""The row operations in plain PyTorch: the slow definition of what `rows_cpp` and `rows_triton` compute.

Every fused pass over similarities consists of these five operations. `G` layers are computed together; `R` anchor rows
of one sequence are compared with its `n` tokens, which lie in `P` frames; each token may carry `V` numbers (for the
depth loss V = 1, the depth of its patch).

With `x_ik` the raw dot product of two embeddings and `r` the inverse norms,

    s_ik  = x_ik r_i r_k / tau                                  cosine similarity over temperature
    lse_f = log sum_{k in f} exp(s_ik)                          `k != i` where the own token is excluded
    E_fv  = sum_{k in f, known} exp(s_ik - known_lse_f) v_kv    expected value, over the tokens of known value

and, for upstream gradients `a_f = dL/dlse_f` and `b_fv = dL/dE_fv`,

    dL/ds_ik = a_f exp(s_ik - lse_f) + known_k exp(s_ik - known_lse_f) sum_v b_fv (v_kv - E_fv)

Embeddings are never normalised in memory. The gradient is taken with respect to the raw dot products,
`dL/dx_ik = dL/ds_ik r_i r_k / tau`; two matrix products with the *raw* embeddings turn it into
`u = dL/dx E + (dL/dx)^T E_rows`, and the Jacobian of the normalisation is all that remains:
`dL/de = u - e_hat (e_hat . u)`, the part of `u` that is tangent to the sphere. A row whose norm is below 1e-12 is
divided by 1e-12 instead, so it has no such Jacobian and keeps `u`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchTerms, RowChunk, TermWeights

NORM_FLOOR = 1e-12


def inverse_norms(embeddings: Tensor) -> Tensor:
    """`1 / max(|e|, 1e-12)`: [..., N, D] of any float type -> float32 [..., N]."""
    return embeddings.float().square().sum(-1).sqrt().clamp(min=NORM_FLOOR).reciprocal()


def frame_statistics(chunk: RowChunk, runs: MatchRuns | None, every_frame: bool) -> FrameStatistics:
    """Log-sum-exp, expected value and arg-max of each row over each frame.

    With `runs`, expected values are needed only in frames with a match of the row; without `every_frame` the other
    statistics are not needed elsewhere either. The fast versions skip what is not needed; here it is computed and then
    blanked.
    """
    similarity = _scaled(chunk)  # [G, R, n]
    per_frame = []
    for frame, (start, end) in enumerate(_frames(chunk)):
        s = similarity[..., start:end]
        known = None if chunk.known is None else chunk.known[start:end]
        statistics = _statistics_of(s, start, known, None if chunk.values is None else chunk.values[start:end])
        if runs is not None:
            matched = _matched(runs, frame)  # [R]
            statistics = _blanked(statistics, matched, every_frame)
        per_frame.append(statistics)
    lse, known_lse, expected, best, peak = (torch.stack(parts, dim=2) for parts in zip(*per_frame, strict=True))
    return FrameStatistics(lse, known_lse, expected, best, peak)


def loss_terms(
    chunk: RowChunk,
    statistics: FrameStatistics,
    runs: MatchRuns,
    weights: TermWeights | None,
    terms: MatchTerms,
    negatives: str,
    eps: float,
) -> FrameUpstream | None:
    """Write both loss terms of every match of these rows; with `weights`, return the upstream gradients.

    `corr = -s_it + lse` over the target's frame or over all frames; `depth = |d - E| / (d + E + eps)`.
    """
    rows, frames = statistics.lse.shape[1:]
    upstream = None if weights is None else FrameUpstream.zeros_like(statistics)
    sequence_lse = statistics.lse.logsumexp(-1)  # [G, R]
    for row in range(rows):
        for frame in range(frames):
            for at in runs.run(row, frame):
                match, column = int(runs.order[at]), int(runs.target[at]) - runs.first_token
                positive = (
                    chunk.similarity[:, row, column]
                    * chunk.row_scale[:, row]
                    * chunk.token_scale[:, column]
                    / chunk.temperature
                )
                lse = statistics.lse[:, row, frame]
                terms.corr[:, match] = (sequence_lse[:, row] if negatives == "sequence" else lse) - positive
                terms.best[:, match] = statistics.best[:, row, frame] + runs.first_token
                terms.confidence[:, match] = (statistics.peak[:, row, frame] - lse).exp()
                depth, expected = runs.depth[at], statistics.expected[:, row, frame, 0]
                total = depth + expected + eps
                has_depth = bool(runs.has_depth[at])
                terms.depth[:, match] = (depth - expected).abs() / total if has_depth else 0.0
                if weights is None or upstream is None:
                    continue
                if negatives == "sequence":
                    upstream.lse[:, row] += (
                        weights.corr[:, match, None] * (statistics.lse[:, row] - sequence_lse[:, row, None]).exp()
                    )
                else:
                    upstream.lse[:, row, frame] += weights.corr[:, match]
                if has_depth:
                    depth_slope = -torch.sign(depth - expected) / total - (depth - expected).abs() / total.square()
                    upstream.expected[:, row, frame, 0] += weights.depth[:, match] * depth_slope
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
    similarity = _scaled(chunk)
    gradient = torch.zeros_like(similarity)
    for frame, (start, end) in enumerate(_frames(chunk)):
        s = similarity[..., start:end]
        lse, known_lse = statistics.lse[:, :, frame, None], statistics.known_lse[:, :, frame, None]
        # An empty frame receives zero gradient.
        a = torch.where(lse == float("-inf"), 0.0, upstream.lse[:, :, frame, None])
        part = _product(a, (s - lse).exp())
        if chunk.values is not None and chunk.known is not None:
            b = upstream.expected[:, :, frame]  # [G, R, V]
            offset = (b * statistics.expected[:, :, frame]).sum(-1, keepdim=True)
            deviation = b @ chunk.values[start:end].mT - offset  # [G, R, n_f], sum_v b_v (v_kv - E_v)
            part = part + _product(deviation, torch.where(chunk.known[start:end], (s - known_lse).exp(), 0.0))
        gradient[..., start:end] = part
    if runs is not None and weights is not None:
        for row in range(similarity.shape[1]):
            for frame in range(statistics.lse.shape[2]):
                for at in runs.run(row, frame):
                    column = int(runs.target[at]) - runs.first_token
                    gradient[:, row, column] -= weights.corr[:, int(runs.order[at])]
    scale = chunk.row_scale[:, :, None] * chunk.token_scale[:, None, :] / chunk.temperature
    out.copy_(gradient * scale)


def project_gradient(gradient: Tensor, embeddings: Tensor, inverse_norm: Tensor, out: Tensor) -> None:
    """`out = u - e_hat (e_hat . u)`, in the element type of `out`; `gradient` [..., n, D] is `u`, and may be `out`."""
    unit = embeddings.float() * inverse_norm[..., None]
    radial = (unit * gradient).sum(-1, keepdim=True)
    clamped = inverse_norm[..., None] >= 1.0 / NORM_FLOOR
    out.copy_(gradient - torch.where(clamped, 0.0, radial) * unit)


def _scaled(chunk: RowChunk) -> Tensor:
    s = chunk.similarity * chunk.row_scale[:, :, None] * chunk.token_scale[:, None, :] / chunk.temperature
    if not chunk.exclude_own:
        return s
    own = torch.arange(s.shape[-1], device=s.device) == chunk.own_token[:, None]  # [R, n]
    return s.masked_fill(own, float("-inf"))


def _statistics_of(s: Tensor, start: int, known: Tensor | None, values: Tensor | None) -> tuple[Tensor, ...]:
    groups, rows, tokens = s.shape
    width = 0 if values is None else values.shape[1]
    if tokens == 0:
        minus_infinity = s.new_full((groups, rows), float("-inf"))
        no_token = torch.full((groups, rows), -1, device=s.device)
        return minus_infinity, minus_infinity, s.new_zeros(groups, rows, width), no_token, minus_infinity
    peak, best = s.max(-1)
    best = torch.where(peak == float("-inf"), -1, best + start)
    lse = s.logsumexp(-1)
    if values is None or known is None:
        return lse, torch.full_like(lse, float("-inf")), s.new_zeros(groups, rows, 0), best, peak
    known_s = s.masked_fill(~known, float("-inf"))
    known_lse = known_s.logsumexp(-1)
    weight = torch.where(known_lse[..., None] == float("-inf"), 0.0, (known_s - known_lse[..., None]).exp())
    return lse, known_lse, weight @ values, best, peak


def _blanked(statistics: tuple[Tensor, ...], matched: Tensor, every_frame: bool) -> tuple[Tensor, ...]:
    lse, known_lse, expected, best, peak = statistics
    known_lse = torch.where(matched, known_lse, float("-inf"))
    expected = torch.where(matched[:, None], expected, 0.0)
    if not every_frame:
        lse = torch.where(matched, lse, float("-inf"))
        best, peak = torch.where(matched, best, -1), torch.where(matched, peak, float("-inf"))
    return lse, known_lse, expected, best, peak


def _matched(runs: MatchRuns, frame: int) -> Tensor:
    start = runs.start[frame :: runs.longest]
    end = runs.start[frame + 1 :: runs.longest]
    return end > start[: end.shape[0]]


def _frames(chunk: RowChunk) -> list[tuple[int, int]]:
    offsets = chunk.frame_offsets.tolist()
    return list(itertools.pairwise(offsets))


def _product(factor: Tensor, probability: Tensor) -> Tensor:
    """`factor * probability`, 0 for a zero factor even where an empty softmax gives NaN."""
    return torch.where(factor == 0, 0.0, factor * probability)
