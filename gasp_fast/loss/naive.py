"""The loss in plain PyTorch: the definition that every fast backend is tested against.

It shares no code with them, keeps the whole `[L, M, N]` table of similarities, and is differentiated by autograd. Give
it float64 embeddings and it is the judge; give it any problem too large for its table and it runs out of memory.

For a match (i, t), `t` in frame `b`, with normalised embeddings `e` and `s_ik = <e_i, e_k> / tau`:

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

from .matches import Matches


class NaiveLoss(NamedTuple):
    loss: Tensor  # []; [L, M] under reduction="none"
    corr: Tensor  # [L, M], term of each match
    depth: Tensor  # [L, M], 0 for a match without depth
    best: Tensor  # int64 [L, M], most similar token of the target's frame


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
) -> NaiveLoss:
    """Both terms of every match, and the loss that `gasp_loss` makes of them."""
    layers, tokens, _ = embeddings.shape
    anchor, target, device = matches.anchor, matches.target, embeddings.device
    token = torch.arange(tokens, device=device)
    frame = torch.bucketize(token, matches.frame_offsets[1:], right=True)  # [N]
    ends = matches.frame_offsets[-1:] if matches.sequence_offsets is None else matches.sequence_offsets[1:]
    sequence = torch.zeros_like(frame) if matches.sequence_offsets is None else torch.bucketize(frame, ends, right=True)
    in_frame = frame == frame[target][:, None]  # [M, N]
    others = (sequence == sequence[anchor][:, None]) & (token != anchor[:, None])  # [M, N]

    unit = F.normalize(embeddings, dim=-1, eps=1e-12)
    s = torch.einsum("lmd,lnd->lmn", unit[:, anchor], unit) / temperature
    positive = s.gather(2, target.expand(layers, -1)[..., None])[..., 0]  # [L, M]
    candidates = in_frame if negatives == "frame" else others
    corr = s.masked_fill(~candidates, float("-inf")).logsumexp(-1) - positive

    patch_depth = torch.zeros(tokens, device=device) if matches.patch_depth is None else matches.patch_depth
    known = patch_depth.isfinite() & (patch_depth > 0)
    at_target = torch.zeros(len(matches), device=device) if matches.target_depth is None else matches.target_depth
    valid = at_target.isfinite() & (at_target > 0) & (in_frame & known).any(1)  # [M]
    if matches.depth_valid is not None:
        valid &= matches.depth_valid
    logits = s.masked_fill(~(in_frame & known), float("-inf")).masked_fill(
        ~valid[:, None], 0.0
    )  # no softmax of nothing
    values = torch.where(known, patch_depth, 0).to(s.dtype)
    expected = torch.einsum("lmn,n->lm", logits.softmax(-1), values)
    truth = torch.where(valid, at_target, 1).to(s.dtype)
    depth = torch.where(valid, (truth - expected).abs() / (truth + expected + eps), 0)

    weights = (
        s.new_full((layers,), 1.0 if reduction == "none" else 1 / layers) if layer_weights is None else layer_weights
    )
    weights = weights[:, None].to(s.dtype)
    if reduction == "none":
        loss = weights * (corr_weight * corr + depth_weight * depth)
    else:
        counts = (max(1, len(matches)), valid.sum().clamp(min=1)) if reduction == "mean" else (1, 1)
        loss = (weights * (corr_weight * corr / counts[0] + depth_weight * depth / counts[1])).sum()
    return NaiveLoss(loss, corr, depth, s.masked_fill(~in_frame, float("-inf")).argmax(-1))
