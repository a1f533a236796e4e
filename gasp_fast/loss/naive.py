"""The loss in plain PyTorch: the definition of the mathematics, and the reference of the tests.

It shares no code with the backends. It stores the whole `[L, M, N]` table of similarities and is differentiated by
autograd, so it is for small problems; in float64 it is exact enough to measure the error of the backends.

For a match (i, t) with `t` in frame `b`, with embeddings `e` normalised to length 1 and `s_ik = <e_i, e_k> / tau`:

    corr   negatives="frame":     -s_it + log sum over k in b of exp(s_ik)                      (paper, Eq. 5)
           negatives="sequence":  -s_it + log sum over the sequence, k != i, of exp(s_ik)       (paper, Sec. 5.1)
    depth  |d - d_hat| / (d + d_hat + eps), with d_hat = sum_j A_ij patch_depth_j and A_i the softmax of s_i over the
           tokens of b whose depth is known                                                     (paper, Eq. 6-8)

With `keys`, `s_ik = <e_i, k_k> / tau`. With other_targets="ignored", the sum in `corr` leaves out the other targets of
the anchor `i`: for a match (i, t), every k that is the target of another match of `i`, but not `t` itself.

A match has a depth term where its own depth is positive, at most 1e18 and not marked invalid, and `b` has a token of
known depth. The loss of a layer is `corr_weight * mean corr + depth_weight * mean depth`, each mean over the matches
that have the term, by `weight`; the loss is the mean over layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .matches import MOST_DEPTH, Matches


class NaiveLoss(NamedTuple):
    loss: Tensor  # []; [L, M] under reduction="none"
    corr: Tensor  # [L, M], term of each match
    depth: Tensor  # [L, M], 0 for a match without depth term
    has_depth: Tensor  # bool [M]
    best: Tensor  # int64 [L, M], most similar token of the target's frame
    confidence: Tensor  # [L, M], probability of that token within the frame


def naive_loss(
    embeddings: Tensor,  # [L, N, D]
    matches: Matches,
    temperature: float | Tensor = 0.07,
    negatives: str = "sequence",
    corr_weight: float = 0.3,
    depth_weight: float = 1.0,
    eps: float = 1e-6,
    layer_weights: Tensor | None = None,  # [L]
    reduction: str = "mean",
    keys: Tensor | None = None,  # [L, N, D]
    other_targets: str = "negatives",
    metric: Tensor | None = None,  # [L, D, D], positive definite
) -> NaiveLoss:
    """Both terms of every match, and the loss that `gasp_loss` makes of them."""
    (layers, tokens, _), anchor, target = embeddings.shape, matches.anchor, matches.target
    token = torch.arange(tokens, device=embeddings.device)
    frame = torch.bucketize(token, matches.frame_offsets[1:], right=True)  # [N]
    sequence = torch.zeros_like(frame)  # [N]
    if matches.sequence_offsets is not None:
        sequence = torch.bucketize(frame, matches.sequence_offsets[1:], right=True)
    in_frame = frame == frame[target, None]  # [M, N], the frame of the target
    in_sequence = (sequence == sequence[anchor, None]) & (token != anchor[:, None])  # [M, N], without the anchor

    if metric is not None:  # with `metric = C C^T`, the rows of E C have the inner products E C C^T E^T
        embeddings = embeddings @ torch.linalg.cholesky(metric)
    unit = F.normalize(embeddings, dim=-1, eps=1e-12)
    candidates = unit if keys is None else F.normalize(keys, dim=-1, eps=1e-12)
    s = torch.einsum("lmd,lnd->lmn", unit[:, anchor], candidates) / temperature
    positive = s.gather(2, target.expand(layers, -1)[..., None])[..., 0]  # [L, M]
    among = in_frame if negatives == "frame" else in_sequence
    if other_targets == "ignored":
        is_target = torch.zeros_like(among).index_put((torch.arange(len(matches)), target), torch.tensor(True))
        of_anchor = (anchor[:, None] == anchor).to(torch.int64) @ is_target.to(torch.int64) > 0  # [M, N]
        among = among & (~of_anchor | is_target)
    corr = _masked(s, among).logsumexp(-1) - positive

    patch_depth = torch.zeros(tokens) if matches.patch_depth is None else matches.patch_depth
    target_depth = torch.zeros(len(matches)) if matches.target_depth is None else matches.target_depth
    patch_depth, target_depth = patch_depth.to(s), target_depth.to(s)
    known = in_frame & patch_depth.isfinite() & (patch_depth > 0) & (patch_depth <= MOST_DEPTH)  # [M, N]
    has_depth = target_depth.isfinite() & (target_depth > 0) & (target_depth <= MOST_DEPTH) & known.any(1)  # [M]
    if matches.depth_valid is not None:
        has_depth = has_depth & matches.depth_valid
    logits = torch.where(has_depth[:, None], _masked(s, known), 0)  # 0: a softmax of nothing would be NaN
    expected = torch.einsum("lmn,mn->lm", logits.softmax(-1), torch.where(known, patch_depth, 0))
    truth = torch.where(has_depth, target_depth, 1)
    depth = torch.where(has_depth, (truth - expected).abs() / (truth + expected + eps), 0)

    if layer_weights is None:
        layer_weights = s.new_full((layers,), 1 if reduction == "none" else 1 / layers)
    weights = layer_weights[:, None].to(s)
    match_weight = s.new_ones(len(matches)) if matches.weight is None else matches.weight.to(s)  # [M]
    if reduction == "mean":
        corr_share, depth_share = _share(match_weight), _share(match_weight * has_depth)
        loss = (weights * (corr_weight * corr * corr_share + depth_weight * depth * depth_share)).sum()
    else:
        loss = weights * (corr_weight * corr + depth_weight * depth)
        loss = loss if reduction == "none" else (loss * match_weight).sum()
    in_frame_s = _masked(s, in_frame)
    return NaiveLoss(loss, corr, depth, has_depth, in_frame_s.argmax(-1), in_frame_s.softmax(-1).amax(-1))


def _share(weight: Tensor) -> Tensor:
    return weight / torch.where(weight.sum() > 0, weight.sum(), 1)


def _masked(s: Tensor, among: Tensor) -> Tensor:
    return s.masked_fill(~among, float("-inf"))
