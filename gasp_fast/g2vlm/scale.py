"""The scale that best aligns predicted points with true ones.

Predicted geometry has no unit, so each sample is compared after multiplying it by

    s* = argmin_s  sum_i  w_i |s a_i - b_i|

over the coordinates a_i of predicted points and b_i of true ones. The sum is w_i |a_i| |s - b_i / a_i| for every a_i
other than 0, and constant in s for the rest. So s* is the median of the ratios b_i / a_i with weights w_i |a_i|: the
first ratio, in ascending order, at which the weights so far reach half of the total. This is exact. Where an interval
of scales is optimal, that is the lower end of it.

All samples of a batch are solved at once, in tensors whose shapes do not depend on how many points are valid, so
nothing waits for the device. No gradient flows through the scale: at the optimum it would be zero almost everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 4096  # of a sample are enough to place a median


@torch.no_grad()
def best_scale(predicted: Tensor, true: Tensor, weight: Tensor) -> Tensor:
    """`argmin_s sum weight |s predicted - true|` of each row: [B, K] coordinates and weights >= 0 -> [B].

    A row in which nothing has weight, or every prediction with weight is 0, has the scale 1. Computed in float64; the
    result is float32, or float64 for predictions in float64.
    """
    element = torch.promote_types(predicted.dtype, torch.float32)
    predicted, true, weight = predicted.double(), true.double(), weight.double()
    counts = (weight > 0) & (predicted != 0)
    ratio = torch.where(counts, true / torch.where(counts, predicted, 1), torch.inf)  # [B, K]
    share = torch.where(counts, weight * predicted.abs(), 0)
    ratio, order = ratio.sort(dim=-1, stable=True)
    reached = share.gather(-1, order).cumsum(-1)  # [B, K]
    total = reached[:, -1:]
    at = (reached < total / 2).sum(-1, keepdim=True)  # [B, 1], the first that reaches half
    scale = ratio.gather(-1, at.clamp(max=ratio.shape[-1] - 1))
    return torch.where(total > 0, scale, 1).squeeze(-1).to(element)


@torch.no_grad()
def evenly_chosen(valid: Tensor, count: int = POINTS) -> tuple[Tensor, Tensor]:
    """`count` valid points of each row, spread evenly over them: bool [B, P] -> positions [B, count], bool [B, count].

    Where a row has fewer, each is chosen once, and the second result says which positions hold one.
    """
    ordinal = valid.cumsum(-1)  # [B, P], how many are valid up to here
    total = ordinal[:, -1:]  # [B, 1]
    number = torch.arange(count, device=valid.device)  # [K]
    wanted = torch.where(total > count, number * total // count, number)  # [B, K], counted among the valid points
    position = torch.searchsorted(ordinal, wanted + 1)
    return position.clamp(max=valid.shape[-1] - 1), wanted < total


def aligning_scale(predicted: Tensor, true: Tensor, weight: Tensor, count: int = POINTS) -> Tensor:
    """The best scale of each sample, from `count` of its points: [B, P, 3], [B, P, 3], weights [B, P] -> [B].

    Points of weight 0 are not valid.
    """
    position, chosen = evenly_chosen(weight > 0, count)  # [B, K]
    weight = torch.where(chosen, weight.gather(1, position), 0)
    points = position[..., None].expand(-1, -1, 3)
    a, b = predicted.detach().gather(1, points), true.gather(1, points)  # [B, K, 3]
    return best_scale(a.flatten(1), b.flatten(1), weight[..., None].expand(-1, -1, 3).flatten(1))
