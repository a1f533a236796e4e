"""The mathematics of the geometric losses in plain PyTorch: the page to read first.

This is the `torch` backend. It materialises every anchor-by-token similarity, lets autograd differentiate, and runs in
any float type on any device: in float64 it is the judge of all the other backends.

For an embedding `e_i` of one layer, `e_hat_i = e_i / max(|e_i|, 1e-12)` and `s_ik = <e_hat_i, e_hat_k> / tau`. For a
match (i, t) with `t` in frame `b`:

    corr   negatives="frame":     -s_it + log sum over k in b of exp(s_ik)                      (paper, Eq. 5)
           negatives="sequence":  -s_it + log sum over the sequence, k != i, of exp(s_ik)       (paper, Sec. 5.1)
    depth  |d - d_hat| / (d + d_hat + eps), with d_hat = sum_j A_ij patch_depth_j and A_i the softmax of s_i over the
           tokens of b whose depth is known                                                      (paper, Eq. 6-8)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gasp_fast.kernels.plan import MatchPlan, RowPlan


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
    rows: RowPlan,
    temperature: Tensor,
    values: Tensor | None,  # [N, V]
    known: Tensor | None,  # bool [N]
    exclude_own: bool,
) -> DenseFrames:
    with torch.autocast(embeddings.device.type, enabled=False):  # the caller's autocast is not meant for losses
        return _dense_frame_match(embeddings, rows, temperature, values, known, exclude_own)


def _dense_frame_match(
    embeddings: Tensor,
    rows: RowPlan,
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
) -> DenseFrames:
    unit = _normalized(embeddings)
    per_sequence, similarity = [], []
    for span in rows.sequences():
        first, last = span.tokens
        row_token = rows.row_token[span.rows[0] : span.rows[1]]
        s = unit[:, row_token] @ unit[:, first:last].mT / temperature.to(unit.dtype)  # [L, R, n]
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
    plan: MatchPlan,
    temperature: Tensor,
    sequence_negatives: bool,
    eps: float,
    match_depth: Tensor | None = None,  # [M] and [N] in full precision, where the caller has it
    patch_depth: Tensor | None = None,
) -> DenseTerms:
    values = plan.values if patch_depth is None else torch.where(plan.known, patch_depth, 0)[:, None]
    frames = dense_frame_match(embeddings, plan.rows, temperature, values, plan.known, exclude_own=True)
    row, frame = _by_match(plan, plan.row), _by_match(plan, _local_frame(plan))
    positive = _by_match(plan, _positives(plan, frames.similarity).mT).mT  # [L, M]
    lse = frames.lse[:, row, frame]
    corr = (frames.lse.logsumexp(-1)[:, row] if sequence_negatives else lse) - positive

    expected = frames.expected[:, row, frame, 0]
    counts = _by_match(plan, plan.counts)
    depth = (_by_match(plan, plan.depth) if match_depth is None else match_depth).to(expected.dtype)
    depth = torch.where(counts, depth, 1)  # a match without depth still needs a finite term to be masked
    term = (depth - expected).abs() / (depth + expected + eps)
    return DenseTerms(
        corr=corr,
        depth=torch.where(counts, term, 0),
        best=frames.best[:, row, frame],
        confidence=(frames.peak[:, row, frame] - lse).exp().detach(),
    )


def _normalized(embeddings: Tensor) -> Tensor:
    """Norms of 16-bit numbers are taken in float32: float16 has no 1e-12 to clamp at."""
    wide = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
    return F.normalize(wide, dim=-1, eps=1e-12).to(embeddings.dtype)


def _frame_statistics(
    s: Tensor,  # [L, R, n_f]
    start: int,
    end: int,
    values: Tensor | None,
    known: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if s.shape[-1] == 0:
        nothing = s.new_full(s.shape[:-1], float("-inf"))
        width = 0 if values is None else values.shape[-1]
        return nothing, s.new_zeros(*s.shape[:-1], width), torch.full_like(nothing, -1, dtype=torch.long), nothing
    peak, best = s.detach().max(-1)
    best = torch.where(peak == float("-inf"), -1, best + start)
    if values is None:
        expected = s.new_zeros(*s.shape[:-1], 0)
    else:
        among = s if known is None else s.masked_fill(~known[start:end], float("-inf"))
        some = among.detach().amax(-1, keepdim=True) > float("-inf")
        # A softmax over nothing is NaN, and so would be its gradient: give such rows harmless logits, then zero them.
        weight = torch.where(some, torch.where(some, among, 0).softmax(-1), 0)
        expected = weight @ values[start:end].to(s.dtype)
    return _logsumexp(s), expected, best, peak


def _logsumexp(s: Tensor) -> Tensor:
    """`logsumexp` whose gradient over nothing but -inf (a one-token frame without its token) is zero, not NaN."""
    some = s.detach().amax(-1, keepdim=True) > float("-inf")
    return torch.where(some[..., 0], torch.where(some, s, 0).logsumexp(-1), float("-inf"))


def _positives(plan: MatchPlan, similarity: list[Tensor]) -> Tensor:
    """[L, M], sorted: each match's own similarity. Sorted matches follow the sequences."""
    parts = []
    for span, s in zip(plan.rows.sequences(), similarity, strict=True):
        start, end = (int(plan.run_start[row * plan.rows.longest]) for row in span.rows)
        parts.append(s[:, plan.row[start:end] - span.rows[0], plan.target[start:end] - span.tokens[0]])
    return torch.cat(parts, dim=1)


def _local_frame(plan: MatchPlan) -> Tensor:
    """int64 [M], sorted: the frame of each match within its sequence."""
    position = torch.arange(plan.order.shape[0], device=plan.order.device)
    cell = torch.searchsorted(plan.run_start[1:].contiguous(), position, right=True)
    return cell - plan.row * plan.rows.longest


def _by_match(plan: MatchPlan, sorted_values: Tensor) -> Tensor:
    """[M, ...] from sorted positions back to the order of `Matches`."""
    return torch.empty_like(sorted_values).index_copy(0, plan.order, sorted_values)
