"""How the terms of all matches and layers become one loss.

    loss = sum over layers l and matches m of
           layer_weights[l] * (corr_weight * corr_share[m] * corr[l, m] + depth_weight * depth_share[m] * depth[l, m])

A share is the weight of one match in a layer's mean (its `weight`, divided by the sum over the matches that have the
term) or sum (its `weight`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gasp_fast.kernels.chunk import MatchTerms, TermWeights
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.match_means import match_means


class MatchShares(NamedTuple):
    corr: Tensor  # [M], or [1] where all are equal
    depth: Tensor

    @staticmethod
    def of(index: MatchIndex, reduction: str, dtype: torch.dtype) -> MatchShares:
        """Under "none" terms stay apart; the shares then serve the per-layer means."""
        if reduction == "sum":
            weight = index.weight.to(dtype)
            return MatchShares(weight, weight)
        return MatchShares(index.corr_share.to(dtype), index.depth_share.to(dtype))


def term_weights(
    index: MatchIndex,
    layer_weights: Tensor,  # [L]
    corr_weight: float,
    depth_weight: float,
    reduction: str,  # "mean" | "sum"
) -> TermWeights:
    """The three factors of each term, multiplied: [L, M], expanded where all matches count alike."""
    shares = MatchShares.of(index, reduction, torch.float32)
    per_layer, shape = layer_weights.float()[:, None], (layer_weights.shape[0], index.order.shape[0])
    return TermWeights(
        corr=(per_layer * (corr_weight * shares.corr)).expand(shape),
        depth=(per_layer * (depth_weight * shares.depth)).expand(shape),
    )


def layer_losses(corr: Tensor, depth: Tensor, shares: MatchShares) -> tuple[Tensor, Tensor]:
    """The mean or sum of each term [L, M] over matches: [L] each."""
    return (corr * shares.corr).sum(1), (depth * shares.depth).sum(1)


class MeansOfMatches(torch.autograd.Function):
    """`match_means` of the four tensors of `MatchTerms`; the means of corr and depth are differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        corr: Tensor,
        depth: Tensor,
        best: Tensor,
        confidence: Tensor,
        index: MatchIndex,
        target: Tensor,
        places: tuple[Tensor, Tensor] | None,  # of tokens, and of the matches' targets
        radius: int,
    ) -> Tensor:
        ctx.index, ctx.shape = index, corr.shape
        terms = MatchTerms(*(term.contiguous() for term in (corr, depth, best, confidence)))
        xy, target_xy = (None, None) if places is None else places
        return match_means(terms, target, (index.corr_share, index.depth_share), xy, target_xy, radius)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        shares = MatchShares.of(ctx.index, "mean", upstream.dtype)
        of_terms = ((upstream[:, n, None] * share).expand(ctx.shape) for n, share in enumerate(shares))
        return *of_terms, *[None] * 6
