"""How the terms of all matches and layers become one loss.

    loss = sum over layers l and matches m of
           layer_weights[l] * (corr_weight * corr_share * corr[l, m] + depth_weight * depth_share * depth[l, m])

A share is the weight of one match in a layer's mean (1 / number of matches that have the term) or sum (1).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gasp_fast.kernels.chunk import TermWeights
from gasp_fast.kernels.index import MatchIndex


class MatchShares(NamedTuple):
    corr: float
    depth: float | Tensor

    @staticmethod
    def of(index: MatchIndex, reduction: str) -> MatchShares:
        """Shares under "sum" are 1. Under "none" terms stay apart; the shares then serve the per-layer means."""
        if reduction == "sum":
            return MatchShares(1.0, 1.0)
        return MatchShares(1.0 / max(1, index.order.shape[0]), index.depth_count.reciprocal())


def term_weights(
    index: MatchIndex,
    layer_weights: Tensor,  # [L]
    corr_weight: float,
    depth_weight: float,
    reduction: str,  # "mean" | "sum"
) -> TermWeights:
    """The three factors of each term, multiplied: [L, M], expanded."""
    shares, per_layer = MatchShares.of(index, reduction), layer_weights.float()[:, None]  # [L, 1]
    shape = (layer_weights.shape[0], index.order.shape[0])
    return TermWeights(
        corr=(per_layer * (corr_weight * shares.corr)).expand(shape),
        depth=(per_layer * (depth_weight * shares.depth)).expand(shape),
    )


def layer_losses(corr: Tensor, depth: Tensor, shares: MatchShares) -> tuple[Tensor, Tensor]:
    """The mean or sum of each term [L, M] over matches: [L] each."""
    return (corr * shares.corr).sum(1), (depth * shares.depth).sum(1)
