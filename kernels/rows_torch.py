"""The row operations in plain PyTorch: the slow definition of what `rows_cpp` and `rows_triton` compute.

Every fused pass over similarities consists of these operations. `G` layers are computed together; `R` anchor rows
of one sequence are compared with its `n` tokens, which lie in `P` frames; each token may carry `V` numbers (for the
depth loss V = 1, the depth of its patch).

With `x_ik` the raw dot product of two embeddings and `r` the inverse norms,

    s_ik  = x_ik r_i r_k / tau                                  cosine similarity over temperature
    lse_f = log sum_{k in f} exp(s_ik)                          `k != i` where the own token is excluded
    E_fv  = sum_{k in f, known} exp(s_ik - known_lse_f) v_kv    expected value, over the tokens of known value

and, for upstream gradients `a_f = dL/dlse_f` and `b_fv = dL/dE_fv`,

    dL/ds_ik = a_f exp(s_ik - lse_f) + known_k exp(s_ik - known_lse_f) sum_v b_fv (v_kv - E_fv)

Where the other targets of an anchor are ignored, the term of a match (i, t) is `-s_it + log(exp(L_i) + exp(s_it))`. The
sum `L_i` over the negatives leaves out all targets of `i`; `negative_lse_f` is its part in a frame, and takes the place
of `lse_f` in the first part of the gradient. Each match adds the gradient of its own `s_it`.

Embeddings are never normalised in memory. The gradient is taken with respect to the raw dot products,
`dL/dx_ik = dL/ds_ik r_i r_k / tau`; two matrix products with the *raw* embeddings turn it into
`u = dL/dx E + (dL/dx)^T E_rows`, and the Jacobian of the normalisation is all that remains:
`dL/de = u - e_hat (e_hat . u)`, the part of `u` that is tangent to the sphere. A row whose norm is below 1e-12 is
divided by 1e-12 instead, so it has no such Jacobian and keeps `u`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

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

NORM_FLOOR = 1e-12
LEAST_COSINE = 2.0**-8  # of a token and its dual
NOTHING = float("-inf")  # the log of an empty sum


def inverse_norms(embeddings: Tensor, duals: Tensor | None = None) -> Tensor:
    """`1 / max(|e|, 1e-12)`: [..., N, D] of any float type -> float32 [..., N].

    With `duals`, `|e|^2 = e . e'` is a difference of large numbers where it is small. What rounding makes of one below
    `LEAST_COSINE |e| |e'|` is not used, but that bound. A token for which both are 0 has no direction: it gets 1e-12,
    with which its cosines and its gradient vanish (a factor of 0 would turn -inf, an excluded similarity, into NaN).
    """
    e = embeddings.float()
    if duals is None:
        return e.square().sum(-1).sqrt().clamp(min=NORM_FLOOR).reciprocal()
    d = duals.float()
    least = LEAST_COSINE * (e.square().sum(-1) * d.square().sum(-1)).sqrt()
    inverse = torch.maximum((e * d).sum(-1), least).rsqrt()
    return torch.where(least == 0, NORM_FLOOR, inverse)


def norms_and_rows(
    tokens: Tensor,  # [G, n, D]
    duals: Tensor | None,  # [G, n, D]
    own: Tensor,  # int64 [R], the tokens that are rows
    row_of: Tensor,  # int64 [n], `RowIndex.token_row`, which says the same; not used here, nor by `rows_cpp`
    norms: Tensor,  # float32 [G, n], written: inverse norms
    of_rows: Tensor,  # float32 [G, R], written: those of the rows
    anchors: Tensor | None,  # [G, R, D], written if given: the rows
) -> None:
    norms.copy_(inverse_norms(tokens, duals))
    torch.index_select(norms, 1, own, out=of_rows)
    if anchors is not None:
        gather_rows(tokens, own, anchors)


def frame_statistics(
    chunk: RowChunk,
    matches: ChunkMatches | None,
    previous: FrameStatistics | None,  # of the same rows over earlier columns; merged into the result
    memory: PartMemory | None = None,  # not used here, nor by `rows_cpp`
) -> FrameStatistics:
    """Log-sum-exp, expected value and arg-max of each row over each frame; writes `matches.positive`.

    With `matches`, expected values are needed only in frames with a match of the row; unless `definition.every_frame`
    the other statistics are not needed elsewhere either. The fast versions skip what is not needed; here it is computed
    and then blanked.
    """
    s = _scaled(chunk)  # [G, R, n]
    ignored = matches is not None and matches.definition.ignores_targets
    s_negative = s.clone() if ignored else s
    if matches is not None:
        for at, row, column in _pairs(chunk, matches):
            matches.positive[:, at] = s[:, row, column]
            if ignored:
                s_negative[:, row, column] = NOTHING
    per_frame = []
    for frame, (start, end) in enumerate(_frames(chunk)):
        known = None if chunk.known is None else chunk.known[start:end]
        values = None if chunk.values is None else chunk.values[start:end]
        negative_lse = s_negative[..., start:end].logsumexp(-1)
        statistics = (*_statistics_of(s[..., start:end], chunk.first_token + start, known, values), negative_lse)
        if matches is not None:
            statistics = _blanked(statistics, _matched(matches, frame), matches.definition.every_frame)
        per_frame.append(statistics)
    found = FrameStatistics(*(torch.stack(parts, dim=2) for parts in zip(*per_frame, strict=True)))
    if not ignored:
        found = found._replace(negative_lse=found.lse)
    return found if previous is None else merged(previous, found)


def merged(first: FrameStatistics, second: FrameStatistics) -> FrameStatistics:
    """Statistics over the columns of both, which lie in this order."""
    known_lse = torch.logaddexp(first.known_lse, second.known_lse)
    reference = torch.where(known_lse == NOTHING, 0.0, known_lse)
    shares = ((part.known_lse - reference).exp()[..., None] for part in (first, second))
    expected = sum(share * part.expected for share, part in zip(shares, (first, second), strict=True))
    assert isinstance(expected, Tensor)
    later = ~(first.peak >= second.peak) & (second.best >= 0)  # a NaN in either is passed on
    lse = torch.logaddexp(first.lse, second.lse)
    same = first.negative_lse is first.lse
    return FrameStatistics(
        lse=lse,
        known_lse=known_lse,
        expected=expected,
        best=torch.where(later, second.best, first.best),
        peak=torch.maximum(first.peak, second.peak),
        negative_lse=lse if same else torch.logaddexp(first.negative_lse, second.negative_lse),
    )


def loss_terms(
    statistics: FrameStatistics,
    matches: ChunkMatches,
    weights: TermWeights | None,
    terms: MatchTerms,
    memory: PartMemory | None = None,
) -> FrameUpstream | None:
    """Write both loss terms of every match of these rows; with `weights`, return the upstream gradients.

    `corr = -s_it + lse` over the target's frame or over all frames; `depth = |d - E| / (d + E + eps)`.
    """
    definition = matches.definition
    upstream = None
    if weights is not None:
        upstream = FrameUpstream(torch.zeros_like(statistics.lse), torch.zeros_like(statistics.expected))
    for row in range(statistics.lse.shape[1]):
        frame_lse = statistics.negative_lse[:, row]  # [G, P]
        for frame in range(statistics.lse.shape[2]):
            among = slice(None) if definition.every_frame else slice(frame, frame + 1)  # frames of the negatives
            for at in matches.run(row, frame):
                match, positive = int(matches.order[at]), matches.positive[:, at]  # [G]
                normaliser = frame_lse[:, among].logsumexp(-1)
                if definition.ignores_targets:
                    normaliser = torch.logaddexp(normaliser, positive)
                terms.corr[:, match] = normaliser - positive
                terms.best[:, match] = statistics.best[:, row, frame]
                terms.confidence[:, match] = (statistics.peak[:, row, frame] - statistics.lse[:, row, frame]).exp()
                depth, expected = matches.depth[at], statistics.expected[:, row, frame, 0]
                total, has_depth = depth + expected + definition.eps, bool(matches.has_depth[at])
                terms.depth[:, match] = (depth - expected).abs() / total if has_depth else 0.0
                if weights is None or upstream is None or matches.pull is None:
                    continue
                weight = weights.corr[:, match]  # [G]
                upstream.lse[:, row, among] += weight[:, None] * (frame_lse[:, among] - normaliser[:, None]).exp()
                if definition.ignores_targets:  # 1 - p is the probability of the negatives
                    weight = weight * (frame_lse[:, among].logsumexp(-1) - normaliser).exp()
                matches.pull[:, at] = -weight
                if has_depth:
                    depth_slope = -torch.sign(depth - expected) / total - (depth - expected).abs() / total.square()
                    upstream.expected[:, row, frame, 0] += weights.depth[:, match] * depth_slope
    return upstream


def similarity_gradient(
    chunk: RowChunk,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    matches: ChunkMatches | None,
    out: Tensor,  # [G, R, n], in the element type of the matrix products; may be `chunk.similarity` itself
) -> None:
    """Write `dL/dx`. With `matches`, each adds `matches.pull` at its target's column."""
    s = _scaled(chunk)
    if matches is not None:  # `frame_statistics` may have overwritten them
        for at, row, column in _pairs(chunk, matches):
            s[:, row, column] = matches.positive[:, at]
    gradient = torch.zeros_like(s)
    for frame, (start, end) in enumerate(_frames(chunk)):
        part = _softmax_gradient(
            s[..., start:end], statistics.negative_lse[:, :, frame], upstream.lse[:, :, frame, None]
        )
        if matches is not None and matches.definition.ignores_targets:
            for _, row, column in _pairs(chunk, matches):
                if start <= column < end:
                    part[:, row, column - start] = 0.0
        if chunk.values is not None and chunk.known is not None:
            b = upstream.expected[:, :, frame]  # [G, R, V]
            offset = (b * statistics.expected[:, :, frame]).sum(-1, keepdim=True)
            deviation = b @ chunk.values[start:end].mT - offset  # [G, R, n_f], sum_v b_v (v_kv - E_v)
            among_known = _softmax_gradient(s[..., start:end], statistics.known_lse[:, :, frame], deviation)
            part = part + torch.where(chunk.known[start:end] > 0, among_known, 0.0)
        gradient[..., start:end] = part
    if matches is not None and matches.pull is not None:
        for at, row, column in _pairs(chunk, matches):
            gradient[:, row, column] += matches.pull[:, at]
    scale = chunk.row_scale[:, :, None] * chunk.token_scale[:, None, :] / chunk.temperature
    out.copy_(gradient * scale)


def fold(
    x: Tensor,  # [G, R, n], where each row is one of the columns
    own: Tensor,  # int64 [R], which
    row_of: Tensor,  # int64 [n], the row that each column is, or -1; not used here, nor by `rows_cpp`
    others: Tensor,  # int64 [n - R], the other columns
    rest: Tensor,  # [G, R, n - R], written: `x` at these
) -> None:
    """Add what is between two rows, both ways: `x_ij` and `x_ji` become their sum, and `x_ii` twice itself."""
    pairs = x.index_select(2, own).float()
    total = pairs + pairs.mT
    if x.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        total = total.clamp(-largest, largest)
    x.index_copy_(2, own, total.to(x.dtype))
    rest.copy_(x.index_select(2, others))


def gather_rows(source: Tensor, index: Tensor, out: Tensor) -> None:
    """`out = source[:, index]`: [G, n, D], [R] -> [G, R, D], in the element type of `out`."""
    if source.dtype == out.dtype:
        torch.index_select(source, 1, index, out=out)
    else:
        out.copy_(source.index_select(1, index))


def add_rows(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """`out[:, columns] += rows`: [G, R, D], [R], [G, n, D]. No column occurs twice."""
    out.index_add_(1, columns, rows)


def project_gradient(
    gradient: Tensor,  # float32 [G, n, D], may be `out`; the fast versions may overwrite it
    embeddings: Tensor,  # [G, n, D]
    inverse_norm: Tensor,  # [G, n]
    out: Tensor,
    of_unit: bool,
    factor: Tensor | None = None,  # float32 [G], contiguous
    added: AddedRows | None = None,
    tokens: Tensor | None = None,  # int64 [m]
    duals: Tensor | None = None,  # [G, n, D]
) -> None:
    """`out = u - e_hat (e_hat . u)`, in the element type of `out`, with `u = factor (gradient + added)`.

    `u` is the gradient of the raw embeddings as if norms were constants; with `of_unit`, that of the normalised ones.
    With `tokens`, the gradient is that of these alone, [G, m, D], and `out` is written there. With `duals`, the product
    in brackets is that of a normalised dual and `u`.
    """
    if tokens is not None:
        of_these = torch.empty_like(gradient, dtype=out.dtype)
        embeddings, inverse_norm = embeddings.index_select(1, tokens), inverse_norm.index_select(1, tokens)
        duals = None if duals is None else duals.index_select(1, tokens)
        project_gradient(gradient, embeddings, inverse_norm, of_these, of_unit, factor, added, duals=duals)
        out.index_copy_(1, tokens, of_these)
        return
    u = gradient
    if added is not None:
        at = added.of_token - added.first_row
        u = u + torch.where((at >= 0)[:, None], added.rows[:, at.clamp(min=0)], 0.0)
    if factor is not None:
        u = u * factor[:, None, None]
    unit = embeddings.float() * inverse_norm[..., None]
    dual = unit if duals is None else duals.float() * inverse_norm[..., None]
    radial = (dual * u).sum(-1, keepdim=True)
    clamped = inverse_norm[..., None] >= 1.0 / NORM_FLOOR
    tangent = u - torch.where(clamped, 0.0, radial) * unit
    out.copy_(tangent * inverse_norm[..., None] if of_unit else tangent)


def _scaled(chunk: RowChunk) -> Tensor:
    s = chunk.similarity * chunk.row_scale[:, :, None] * chunk.token_scale[:, None, :] / chunk.temperature
    if not chunk.exclude_own:
        return s
    own = torch.arange(s.shape[-1], device=s.device) == chunk.row_token[:, None] - chunk.first_token  # [R, n]
    return s.masked_fill(own, NOTHING)


def _pairs(chunk: RowChunk, matches: ChunkMatches) -> Iterator[tuple[int, int, int]]:
    """(sorted position, row, column) of the matches whose target is in the chunk."""
    for at in range(int(matches.start[0]), int(matches.start[-1])):
        row, column = int(matches.row[at]) - matches.first_row, int(matches.target[at]) - chunk.first_token
        if 0 <= column < chunk.similarity.shape[-1]:
            yield at, row, column


def _statistics_of(s: Tensor, first_token: int, known: Tensor | None, values: Tensor | None) -> tuple[Tensor, ...]:
    groups, rows, tokens = s.shape
    width = 0 if values is None else values.shape[1]
    if tokens == 0:
        minus_infinity = s.new_full((groups, rows), NOTHING)
        no_token = torch.full((groups, rows), -1, device=s.device)
        return minus_infinity, minus_infinity, s.new_zeros(groups, rows, width), no_token, minus_infinity
    peak, best = s.max(-1)
    best = torch.where(peak == NOTHING, -1, best + first_token)
    lse = s.logsumexp(-1)
    if values is None or known is None:
        return lse, torch.full_like(lse, NOTHING), s.new_zeros(groups, rows, 0), best, peak
    known_s = s.masked_fill(known == 0, NOTHING)
    known_lse = known_s.logsumexp(-1)
    weight = torch.where(known_lse[..., None] == NOTHING, 0.0, (known_s - known_lse[..., None]).exp())
    return lse, known_lse, weight @ values, best, peak


def _softmax_gradient(s: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
    """`factor exp(s - lse)` [G, R, n_f]; 0 for an empty softmax and for a zero factor."""
    probability = (s - torch.where(lse == NOTHING, float("inf"), lse)[..., None]).exp()
    return torch.where(factor == 0, 0.0, factor * probability)


def _blanked(statistics: tuple[Tensor, ...], matched: Tensor, every_frame: bool) -> tuple[Tensor, ...]:
    lse, known_lse, expected, best, peak, negative_lse = statistics
    known_lse = torch.where(matched, known_lse, NOTHING)
    expected = torch.where(matched[:, None], expected, 0.0)
    if not every_frame:
        lse, negative_lse = torch.where(matched, lse, NOTHING), torch.where(matched, negative_lse, NOTHING)
        best, peak = torch.where(matched, best, -1), torch.where(matched, peak, NOTHING)
    return lse, known_lse, expected, best, peak, negative_lse


def _matched(matches: ChunkMatches, frame: int) -> Tensor:
    start = matches.start[frame :: matches.longest]
    end = matches.start[frame + 1 :: matches.longest]
    return end > start[: end.shape[0]]


def _frames(chunk: RowChunk) -> Iterator[tuple[int, int]]:
    """First column of each frame in the chunk, and the one after its last."""
    offsets = (chunk.frame_offsets - chunk.first_column).clamp(0, chunk.similarity.shape[-1])
    return itertools.pairwise(offsets.tolist())
