"""How good predicted geometry is: depth, points and poses, after the alignment that is usual for each.

| metrics                | alignment                                        | of                               |
| ---------------------- | ------------------------------------------------ | -------------------------------- |
| AbsRel, delta < 1.25   | one scale a sequence, least absolute deviations  | depth of valid points            |
| accuracy, completeness | similarity transform (Umeyama), then ICP         | distances to the nearest point   |
| RRA, RTA, AUC          | none: poses of one camera relative to another    | angles, over pairs of frames     |

All are computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rotation import angle_between

WEISZFELD_ROUNDS = 10
ICP_ROUNDS = 20
WORST_DIRECTION = 90.0  # degrees, between lines
TINY = 1e-12
CHUNK = 2048  # points whose distances to all others are in memory at a time


@dataclass(frozen=True)
class DepthMetrics:
    abs_rel: float  # mean |s d' - d| / d
    delta: float  # share of points with max(s d' / d, d / (s d')) < 1.25
    scale: float


def depth_metrics(predicted: Tensor, true: Tensor, valid: Tensor, with_scale: bool = True) -> DepthMetrics:
    """Of one sequence: depth [F, H, W], [F, H, W], bool [F, H, W]. `with_scale`: predicted depth has no unit."""
    ours, truth = predicted[valid].double(), true[valid].double()
    if truth.numel() == 0:
        raise ValueError("valid marks no point; depth cannot be compared")
    scale = least_deviation_scale(ours, truth) if with_scale else torch.ones((), dtype=truth.dtype)
    ours = (scale * ours).clamp(min=TINY)
    ratio = torch.maximum(ours / truth, truth / ours)
    return DepthMetrics(
        float(((ours - truth).abs() / truth).mean()), float((ratio < 1.25).double().mean()), float(scale)
    )


def least_deviation_scale(predicted: Tensor, true: Tensor) -> Tensor:
    """`argmin_s sum |s predicted - true|` by Weiszfeld's method: least squares with the inverse deviations as weights.

    Ten rounds are the convention of published tables; `scale.best_scale` is exact.
    """
    weight = torch.ones_like(true)
    scale = torch.ones((), dtype=true.dtype)
    for _ in range(WEISZFELD_ROUNDS):
        scale = (weight * predicted * true).sum() / (weight * predicted * predicted).sum().clamp(min=TINY)
        weight = 1 / (scale * predicted - true).abs().clamp(min=1e-8)
    return scale


@dataclass(frozen=True)
class Similarity:
    """`x -> scale rotation x + translation`."""

    scale: Tensor  # []
    rotation: Tensor  # [3, 3]
    translation: Tensor  # [3]

    def __call__(self, points: Tensor) -> Tensor:
        return self.scale * points @ self.rotation.T + self.translation

    def after(self, first: Similarity) -> Similarity:
        return Similarity(self.scale * first.scale, self.rotation @ first.rotation, self(first.translation))


def umeyama(source: Tensor, target: Tensor, with_scale: bool = True) -> Similarity:
    """The similarity with the least squared distance from each source point to its target: [n, 3], [n, 3]."""
    source, target = source.double(), target.double()
    center, to = source.mean(0), target.mean(0)
    spread = (source - center).square().sum() / len(source)
    u, singular, vt = torch.linalg.svd((target - to).T @ (source - center) / len(source))
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))  # no reflection
    rotation = u @ torch.diag(sign) @ vt
    scale = (singular * sign).sum() / spread.clamp(min=TINY) if with_scale else torch.ones((), dtype=torch.float64)
    return Similarity(scale, rotation, to - scale * rotation @ center)


@dataclass(frozen=True)
class PointMetrics:
    accuracy: float  # mean distance from a predicted point to the nearest true one
    completeness: float  # mean distance from a true point to the nearest predicted one
    accuracy_median: float
    completeness_median: float


def point_metrics(predicted: Tensor, true: Tensor, reach: float = 0.1) -> PointMetrics:
    """Of one cloud: predicted point i belongs to true point i, [n, 3], [n, 3], in the unit of the truth.

    Aligned by Umeyama's similarity, then rigidly by ICP on pairs of nearest points that are at most `reach` apart.
    """
    if predicted.shape != true.shape or len(true) < 3:
        raise ValueError(
            f"predicted and true are {tuple(predicted.shape)} and {tuple(true.shape)}; both must be [n, 3] with n >= 3"
        )
    predicted, true = predicted.double(), true.double()
    predicted = umeyama(predicted, true)(predicted)
    predicted = iterated_closest_points(predicted, true, reach)(predicted)
    to_true, _ = nearest(predicted, true)
    to_predicted, _ = nearest(true, predicted)
    return PointMetrics(
        float(to_true.mean()), float(to_predicted.mean()), float(to_true.median()), float(to_predicted.median())
    )


def iterated_closest_points(source: Tensor, target: Tensor, reach: float) -> Similarity:
    """The rigid motion to which aligning with the nearest points, again and again, converges."""
    motion = Similarity(
        torch.ones((), dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    )
    for _ in range(ICP_ROUNDS):
        moved = motion(source)
        distance, at = nearest(moved, target)
        near = distance <= reach
        if int(near.sum()) < 3:
            break
        step = umeyama(moved[near], target[at[near]], with_scale=False)
        motion = step.after(motion)
        if float((step(moved) - moved).abs().max()) < 1e-9:
            break
    return motion


def nearest(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and position of the nearest target of each source point: [n, 3], [m, 3] -> [n], int64 [n]."""
    found = [
        torch.cdist(part, target, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        for part in source.split(CHUNK)
    ]
    return torch.cat([values for values, _ in found]), torch.cat([at for _, at in found])


@dataclass(frozen=True)
class PoseMetrics:
    rra: float  # share of pairs whose relative rotation is off by less than the threshold
    rta: float  # the same for the direction of the relative translation
    auc: float  # mean share, over thresholds of 1, 2, ... degrees, of pairs in which both are


def pose_metrics(
    rotation: Tensor,  # [F, 3, 3], predicted camera to any common frame
    translation: Tensor,  # [F, 3]
    true_rotation: Tensor,
    true_translation: Tensor,
    threshold: int = 30,  # degrees
) -> PoseMetrics:
    """Over all pairs of different frames. As in published tables, a direction and its opposite count as the same.

    A translation of 0 has no direction and counts as one that is 90 degrees off.
    """
    if len(rotation) < 2:
        raise ValueError(f"there are {len(rotation)} poses; relative poses take at least 2")
    turned, shift = _relative(rotation, translation)
    true_turned, true_shift = _relative(true_rotation, true_translation)
    turn = torch.rad2deg(angle_between(true_turned, turned))  # [pairs]
    cosine = (shift * true_shift).sum(-1).abs()
    sine = torch.linalg.vector_norm(torch.linalg.cross(shift, true_shift), dim=-1)
    direction = torch.rad2deg(torch.atan2(sine, cosine))
    direction[(shift == 0).all(-1) | (true_shift == 0).all(-1)] = WORST_DIRECTION
    worst = torch.maximum(turn, direction)
    shares = [float((worst < degrees).double().mean()) for degrees in range(1, threshold + 1)]
    return PoseMetrics(
        float((turn < threshold).double().mean()),
        float((direction < threshold).double().mean()),
        sum(shares) / threshold,
    )


def _relative(rotation: Tensor, translation: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations and translations of camera j in camera i, for pairs i < j."""
    i, j = torch.triu_indices(len(rotation), len(rotation), offset=1)
    to_camera = rotation.double().mT[i]
    shift = (to_camera @ (translation[j] - translation[i]).double()[..., None]).squeeze(-1)
    return to_camera @ rotation.double()[j], shift
