"""The `torch` backend: dense similarities of all anchors, differentiated by autograd, in any float type on any device.

It computes what `naive.py` defines, from the same index as the kernels: each anchor once, frame by frame. It is the
backend of float64, of double backward, and of machines without compiled kernels.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gasp_fast.kernels.chunk import TermDefinition
from gasp_fast.kernels.engines import survive_fork
from gasp_fast.kernels.index import MatchIndex, RowIndex
from gasp_fast.kernels.rows_torch import LEAST_COSINE


class DenseFrames(NamedTuple):
    """Per layer, row and frame of the row's sequence; sequences shorter than P frames end in `-inf`."""

    lse: Tensor  # [L, A, P]
    expected: Tensor  # [L, A, P, V]
    best: Tensor  # int64 [L, A, P], token in the batch; -1 in an empty frame
    peak: Tensor  # [L, A, P]
    similarity: list[Tensor]  # [L, R, n] of each sequence


class DenseTerms(NamedTuple):
    corr: Tensor  # [L, M]
    depth: Tensor  # [L, M]
    best: Tensor  # int64 [L, M]
    confidence: Tensor  # [L, M]


def dense_frame_match(
    embeddings: Tensor,  # [L, N, D]
    keys: Tensor,  # [L, N, D]
    rows: RowIndex,
    temperature: Tensor,
    values: Tensor | None,  # [N, V], 0 where unknown
    known: Tensor | None,  # float32 [N], 1 or 0
    exclude_own: bool,
    metric: Tensor | None = None,  # [L, D, D]
) -> DenseFrames:
    if not torch.compiler.is_compiling():
        survive_fork()
    with torch.autocast(embeddings.device.type, enabled=False):  # losses are computed in the type of the embeddings
        if metric is not None:
            return _dense_frame_match(
                *_normalized_in(metric, embeddings), rows, temperature, values, known, exclude_own
            )
        unit = _normalized(embeddings)
        candidates = unit if keys is embeddings else _normalized(keys)
        return _dense_frame_match(unit, candidates, rows, temperature, values, known, exclude_own)


def _dense_frame_match(
    unit: Tensor,
    candidates: Tensor,
    rows: RowIndex,
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
) -> DenseFrames:
    per_sequence, similarity = [], []
    for span in rows.sequences:
        first, last = span.tokens
        row_token = rows.row_token[span.rows[0] : span.rows[1]]
        s = unit[:, row_token] @ candidates[:, first:last].mT / temperature.to(unit.dtype)  # [L, R, n]
        if exclude_own:
            own = torch.arange(first, last, device=s.device) == row_token[:, None]  # [R, n]
            s = s.masked_fill(own, float("-inf"))
        similarity.append(s)
        ends = rows.frame_ends[span.frames[0] : span.frames[1]].tolist()
        per_frame = [
            _frame_statistics(s[..., start - first : end - first], start, end, values, known)
            for start, end in zip([first, *ends[:-1]], ends, strict=True)
        ]
        missing = rows.longest - len(per_frame)
        per_frame += [_frame_statistics(s[..., :0], 0, 0, values, known)] * missing
        per_sequence.append([torch.stack(parts, dim=2) for parts in zip(*per_frame, strict=True)])
    lse, expected, best, peak = (torch.cat(parts, dim=1) for parts in zip(*per_sequence, strict=True))
    return DenseFrames(lse, expected, best, peak, similarity)


def dense_terms(
    embeddings: Tensor,  # [L, N, D]
    keys: Tensor,  # [L, N, D]
    index: MatchIndex,
    temperature: Tensor,
    definition: TermDefinition,
    match_depth: Tensor | None = None,  # [M], and [N] below: in full precision, where the caller has it
    patch_depth: Tensor | None = None,
    metric: Tensor | None = None,  # [L, D, D]
) -> DenseTerms:
    values = index.values if patch_depth is None else torch.where(index.known > 0, patch_depth, 0)[:, None]
    frames = dense_frame_match(
        embeddings, keys, index.rows, temperature, values, index.known, exclude_own=True, metric=metric
    )
    row, frame = _by_match(index, index.row), _by_match(index, _local_frame(index))
    positive = _by_match(index, _positives(index, frames.similarity).mT).mT  # [L, M]
    lse = frames.lse[:, row, frame]
    if definition.ignores_targets:
        normaliser = torch.logaddexp(_negative_lse(index, frames.similarity, definition), positive)
    else:
        normaliser = frames.lse.logsumexp(-1)[:, row] if definition.every_frame else lse
    corr = normaliser - positive

    expected = frames.expected[:, row, frame, 0]
    has_depth = _by_match(index, index.has_depth)
    depth = (_by_match(index, index.depth) if match_depth is None else match_depth).to(expected.dtype)
    depth = torch.where(has_depth, depth, 1)  # without depth, a finite term: NaN times 0 is NaN in backward
    term = (depth - expected).abs() / (depth + expected + definition.eps)
    return DenseTerms(
        corr=corr,
        depth=torch.where(has_depth, term, 0),
        best=frames.best[:, row, frame],
        confidence=(frames.peak[:, row, frame] - lse).exp().detach(),
    )


def _normalized(embeddings: Tensor) -> Tensor:
    """Norms of 16-bit numbers are taken in float32: float16 has no 1e-12 to clamp at."""
    wide = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
    return F.normalize(wide, dim=-1, eps=1e-12).to(embeddings.dtype)


def _normalized_in(metric: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and duals (`metric.py`), both divided by the norms of `inverse_norms`."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    duals = embeddings @ metric.to(embeddings.dtype)
    x, dual = embeddings.to(wide), duals.to(wide)
    with torch.no_grad():
        least = LEAST_COSINE * (x.square().sum(-1) * dual.square().sum(-1)).sqrt()
    squares = torch.maximum((x * dual).sum(-1), least)
    inverse = torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).rsqrt())[..., None]
    return (x * inverse).to(embeddings.dtype), (dual * inverse).to(embeddings.dtype)


def _frame_statistics(
    s: Tensor,  # [L, R, n_f]
    start: int,
    end: int,
    values: Tensor | None,
    known: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if s.shape[-1] == 0:
        minus_infinity = s.new_full(s.shape[:-1], float("-inf"))
        width = 0 if values is None else values.shape[-1]
        no_token = torch.full_like(minus_infinity, -1, dtype=torch.long)
        return minus_infinity, s.new_zeros(*s.shape[:-1], width), no_token, minus_infinity
    peak, best = s.detach().max(-1)
    best = torch.where(peak == float("-inf"), -1, best + start)
    if values is None:
        expected = s.new_zeros(*s.shape[:-1], 0)
    else:
        logits = s if known is None else s.masked_fill(known[start:end] == 0, float("-inf"))
        some = logits.detach().amax(-1, keepdim=True) != float("-inf")  # NaN is passed on
        # A softmax of nothing but -inf is NaN, and so is its gradient: such rows get logits of 0, then weights of 0.
        weight = torch.where(some, torch.where(some, logits, 0).softmax(-1), 0)
        expected = weight @ values[start:end].to(s.dtype)
    return _logsumexp(s), expected, best, peak


def _logsumexp(s: Tensor) -> Tensor:
    """`logsumexp` whose gradient is zero, not NaN, where all is -inf (a one-token frame without its token)."""
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], float("-inf"))
    some = s.detach().amax(-1, keepdim=True) != float("-inf")  # NaN is passed on
    return torch.where(some[..., 0], torch.where(some, s, 0).logsumexp(-1), float("-inf"))


def _positives(index: MatchIndex, similarity: list[Tensor]) -> Tensor:
    """[L, M], sorted: each match's own similarity. Sorted matches follow the sequences."""
    parts = []
    for span, s in zip(index.rows.sequences, similarity, strict=True):
        start, end = index.row_ends[span.rows[0]], index.row_ends[span.rows[1]]
        parts.append(s[:, index.row[start:end] - span.rows[0], index.target[start:end] - span.tokens[0]])
    return torch.cat(parts, dim=1)


def _negative_lse(index: MatchIndex, similarity: list[Tensor], definition: TermDefinition) -> Tensor:
    """[L, M]: log-sum-exp over the negatives of each match's anchor, without all of its targets."""
    parts = []
    for span, s in zip(index.rows.sequences, similarity, strict=True):
        start, end = index.row_ends[span.rows[0]], index.row_ends[span.rows[1]]
        row, column = index.row[start:end] - span.rows[0], index.target[start:end] - span.tokens[0]
        is_target = torch.zeros(s.shape[1:], dtype=torch.bool, device=s.device).index_put(
            (row, column), torch.ones((), dtype=torch.bool, device=s.device)
        )
        s = s.masked_fill(is_target, float("-inf"))
        offsets = index.rows.frame_columns(span).tolist()
        per_frame = torch.stack([_logsumexp(s[..., a:b]) for a, b in itertools.pairwise(offsets)], dim=-1)  # [L, R, P]
        if definition.every_frame:
            parts.append(_logsumexp(per_frame)[:, row])
        else:
            parts.append(per_frame[:, row, _local_frame(index)[start:end]])
    return _by_match(index, torch.cat(parts, dim=1).mT).mT


def _local_frame(index: MatchIndex) -> Tensor:
    """int64 [M], sorted: the frame of each match within its sequence."""
    position = torch.arange(index.order.shape[0], device=index.order.device)
    cell = torch.searchsorted(index.run_start[1:].contiguous(), position, right=True)
    return cell - index.row * index.rows.longest


def _by_match(index: MatchIndex, sorted_values: Tensor) -> Tensor:
    """[M, ...] from sorted positions back to the order of `Matches`."""
    return torch.empty_like(sorted_values).index_copy(0, index.order, sorted_values)
