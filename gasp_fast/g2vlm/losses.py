"""The losses of the geometric expert, in plain PyTorch: their definition, and the judge of faster ones.

A sample is a sequence of F frames of H x W points. Truth and prediction each have

- `local`: the points of every frame in its own camera,
- `world`: the same points in the camera of frame 0; predicted by a head that only serves training,
- `rotation`, `translation`: the pose of every camera, as the map from it to the camera of frame 0.

Nothing has a unit: the truth is divided by the mean distance of its points from the camera of frame 0, the prediction
multiplied by the scale s* that fits its local points best (`scale`). The paper also divides the prediction by its own
mean distance first. That changes no value, because s* follows; here no gradient flows through either. Let x be a true
coordinate, x' a predicted one, z the true depth of its point, and

    w = 1 / max(z, 0.1 mean z of the frame).

| term          | mean of                                                                                  |
| ------------- | ---------------------------------------------------------------------------------------- |
| `local`       | w abs(s* x' - x) over the coordinates of valid points                                    |
| `world`       | the same for the points in the camera of frame 0                                         |
| `normal`      | the Huber loss of the angle between true and predicted normals, see `normal_loss`        |
| `rotation`    | the angle between true and predicted relative rotation, over ordered pairs of frames     |
| `translation` | the Huber loss of s* t' - t, over ordered pairs of frames and coordinates                |

    total = local + world + normal + 0.2 (alpha translation + rotation)

All terms are float32 and each has one value a sample. A mean over nothing is 0. The first three are those of each
point; `dense` computes them and their gradient in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from gasp_fast.kernels import surfaces

from .dense import dense_terms
from .rotation import angle_between
from .scale import aligning_scale

LEAST_DEPTH = 0.1  # of a frame's mean depth: nearer points weigh no more than these
SMALLEST_ANGLE, LARGEST_ANGLE, HUBER_ANGLE = math.radians(1), math.radians(90), math.radians(3)
EDGE = 0.03  # relative range of depth in 3 x 3 points
HUBER_TRANSLATION = 0.1
CAMERA_WEIGHT = 0.2
TINY = 1e-12
SHORTEST = 1e-15  # normal; that of points at a distance of 1e-6 has 1e-12


@dataclass(frozen=True)
class Geometry:
    """What is known, or predicted, of B samples; float32."""

    local: Tensor  # [B, F, H, W, 3]
    world: Tensor  # [B, F, H, W, 3]
    rotation: Tensor  # [B, F, 3, 3]
    translation: Tensor  # [B, F, 3]

    def known(self, valid: Tensor) -> Geometry:
        """With zeros for points that are not valid: a NaN there would reach gradients through products with 0."""
        local, world = (torch.where(valid[..., None], points, 0) for points in (self.local, self.world))
        return Geometry(local, world, self.rotation, self.translation)

    def scaled(self, factor: Tensor) -> Geometry:
        """All lengths times `factor` [B]."""
        of_points, of_cameras = factor.view(-1, 1, 1, 1, 1), factor.view(-1, 1, 1)
        return Geometry(self.local * of_points, self.world * of_points, self.rotation, self.translation * of_cameras)


@dataclass(frozen=True)
class GeometryLoss:
    """The terms of each sample, [B]."""

    dense: Tensor  # local + world + normal
    rotation: Tensor
    translation: Tensor
    local: Tensor  # the parts of `dense`, for logs: the fused kernels give them no gradient
    world: Tensor
    normal: Tensor

    def total(self, translation_weight: float = 200.0, zero_above: float | None = None) -> Tensor:
        """[B]. The paper weighs translation by 200, its code by 100. With `zero_above`, larger totals become 0."""
        camera = translation_weight * self.translation + self.rotation
        total = self.dense + CAMERA_WEIGHT * camera
        return total if zero_above is None else torch.where(total <= zero_above, total, 0)


def geometry_loss(
    predicted: Geometry,
    true: Geometry,
    valid: Tensor,  # bool [B, F, H, W], points whose truth is known
    with_normals: Tensor | None = None,  # bool [B], samples whose depth is smooth enough for normals; None: all
    backend: str = "auto",  # "fused" | "torch"; "auto": the first where it exists for the device
) -> GeometryLoss:
    """The terms of each sample."""
    if backend not in ("auto", "fused", "torch"):
        raise ValueError(f"backend = {backend!r} is unknown; choose one of auto, fused, torch")
    _check(predicted, true, valid)
    true = true.known(valid)
    true = true.scaled(1 / mean_distance(true.world, valid))
    weight = depth_weight(true.local[..., 2], valid)  # [B, F, H, W]
    scale = aligning_scale(predicted.local.flatten(1, 3), true.local.flatten(1, 3), weight.flatten(1))  # [B]
    rotation, translation = camera_losses(predicted.scaled(scale), true)
    points = predicted.local, predicted.world, true.local, true.world, weight, counted_corners(true.local, valid)
    fused = surfaces.available(valid.device) if backend == "auto" else backend == "fused"
    dense, parts = (dense_terms if fused else plain_terms)(*points, with_normals, scale)
    return GeometryLoss(dense, rotation, translation, *parts)


def plain_terms(
    local: Tensor,  # [B, F, H, W, 3], predicted
    world: Tensor,
    true_local: Tensor,
    true_world: Tensor,
    weight: Tensor,  # [B, F, H, W]
    counted: Tensor,  # bool [4, B, F, H - 1, W - 1]
    with_normals: Tensor | None,  # bool [B]
    scale: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """local + world + normal, [B], and these three, [3, B]."""
    by = scale.view(-1, 1, 1, 1, 1)
    normal = normal_loss(local, true_local, counted)
    if with_normals is not None:
        normal = torch.where(with_normals, normal, 0)
    parts = torch.stack(
        [point_loss(by * local, true_local, weight), point_loss(by * world, true_world, weight), normal]
    )
    return parts.sum(0), parts


def mean_distance(points: Tensor, valid: Tensor) -> Tensor:
    """Mean length of valid points [B, F, H, W, 3] -> [B]; 1 where it is 0 or nothing is valid."""
    distance = masked_mean(torch.linalg.vector_norm(points, dim=-1), valid)
    return torch.where(distance > TINY, distance, 1)


def depth_weight(depth: Tensor, valid: Tensor) -> Tensor:
    """`1 / max(z, 0.1 mean z of the frame)`, 0 where the point is not valid: [B, F, H, W]."""
    frame_mean = masked_mean(depth.flatten(0, 1), valid.flatten(0, 1)).view(*depth.shape[:2], 1, 1)
    return torch.where(valid, 1 / depth.maximum(LEAST_DEPTH * frame_mean).clamp(min=TINY), 0)


def point_loss(predicted: Tensor, true: Tensor, weight: Tensor) -> Tensor:
    """Mean of `weight |predicted - true|` over coordinates of points that have weight: [B, F, H, W, 3] -> [B]."""
    valid = weight > 0
    return masked_mean(weight * (predicted - true).abs().mean(-1), valid)


def normal_loss(predicted: Tensor, true: Tensor, counted: Tensor) -> Tensor:
    """Mean over counted corners of blocks of 2 x 2 points: [B, F, H, W, 3], bool [4, B, F, H - 1, W - 1] -> [B].

    Each corner of a block has a normal, the cross product of the two sides that meet there. A corner counts where the
    truth has one: its three points are valid, none lies at an edge of depth, and they span a triangle. The angle
    between the normals is held between 1 and 90 degrees, outside of which it has no gradient, and enters a Huber loss
    that is quadratic up to 3 degrees. Where the predicted points span no triangle the angle is 90 degrees.
    """
    ours, ours_exists = directions(corner_normals(predicted))  # [4, B, F, H - 1, W - 1, 3]
    truth, _ = directions(corner_normals(true))
    sine, cosine = torch.linalg.vector_norm(torch.linalg.cross(ours, truth), dim=-1), (ours * truth).sum(-1)
    angle = torch.where(ours_exists, torch.atan2(sine, cosine).clamp(SMALLEST_ANGLE, LARGEST_ANGLE), LARGEST_ANGLE)
    loss = F.smooth_l1_loss(angle, torch.zeros_like(angle), reduction="none", beta=HUBER_ANGLE)
    return masked_mean(loss.movedim(0, 1), counted.movedim(0, 1))


def counted_corners(true: Tensor, valid: Tensor) -> Tensor:
    """bool [4, B, F, H - 1, W - 1]: corners whose true normal is compared."""
    usable = valid & ~depth_edges(true[..., 2], valid)  # [B, F, H, W]
    return corners_inside(usable) & directions(corner_normals(true))[1]


def directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, and which vectors have a length: [..., 3] -> [..., 3], bool [...]."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.clamp(min=SHORTEST), length[..., 0] > SHORTEST


def corner_normals(points: Tensor) -> Tensor:
    """[..., H, W, 3] -> [4, ..., H - 1, W - 1, 3]: at the corners of each block of 2 x 2 points, clockwise."""
    corners = _corners(points, -3)
    sides = [after - corner for corner, after in zip(corners, corners[1:] + corners[:1], strict=True)]
    return torch.stack([torch.linalg.cross(sides[at], -sides[at - 1]) for at in range(4)])


def corners_inside(usable: Tensor) -> Tensor:
    """bool [..., H, W] -> [4, ..., H - 1, W - 1]: corners of which the point and both its neighbours are usable."""
    corners = _corners(usable, -2)
    return torch.stack([corners[at - 1] & corners[at] & corners[(at + 1) % 4] for at in range(4)])


def _corners(values: Tensor, rows: int) -> list[Tensor]:
    """The four points of each block of 2 x 2, clockwise from the upper left; `rows` is the dimension of H."""

    def part(row: int, column: int) -> Tensor:
        height, width = values.shape[rows], values.shape[rows + 1]
        return values.narrow(rows, row, height - 1).narrow(rows + 1, column, width - 1)

    return [part(0, 0), part(0, 1), part(1, 1), part(1, 0)]


def depth_edges(depth: Tensor, valid: Tensor) -> Tensor:
    """bool [B, F, H, W]: points around which, in 3 x 3 valid points, depth ranges over more than 3 % of their own."""

    def largest(values: Tensor) -> Tensor:
        values = torch.where(valid, values, -torch.inf).flatten(0, 1)[:, None]
        return F.max_pool2d(values, 3, stride=1, padding=1)[:, 0].view_as(depth)

    return valid & (largest(depth) + largest(-depth) > EDGE * depth)


def camera_losses(predicted: Geometry, true: Geometry) -> tuple[Tensor, Tensor]:
    """The rotation term and the translation term, [B] and [B], over ordered pairs of different frames."""
    frames = predicted.translation.shape[1]
    pairs = ~torch.eye(frames, dtype=torch.bool, device=predicted.translation.device)  # [F, F]
    turned, shift = relative_poses(predicted)
    true_turned, true_shift = relative_poses(true)
    pairs = pairs.expand(len(turned), -1, -1)
    angle = angle_between(true_turned, turned)  # [B, F, F]
    error = F.huber_loss(shift, true_shift, reduction="none", delta=HUBER_TRANSLATION).mean(-1)
    return masked_mean(angle, pairs), masked_mean(error, pairs)


def relative_poses(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The pose of camera j in camera i: rotations [B, i, j, 3, 3], translations [B, i, j, 3]."""
    to_camera = geometry.rotation.mT[:, :, None]  # [B, i, 1, 3, 3]
    rotation = to_camera @ geometry.rotation[:, None]
    shift = geometry.translation[:, None] - geometry.translation[:, :, None]  # [B, i, j, 3]
    return rotation, (to_camera @ shift[..., None]).squeeze(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values of each sample where `mask` is set: [B, ...] -> [B]; 0 where nothing is."""
    total = torch.where(mask, values, 0).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp(min=1)


def _check(predicted: Geometry, true: Geometry, valid: Tensor) -> None:
    for name in (field.name for field in fields(Geometry)):
        ours, truth = getattr(predicted, name), getattr(true, name)
        if ours.shape != truth.shape:
            raise ValueError(f"predicted.{name} has the shape {tuple(ours.shape)}, true.{name} {tuple(truth.shape)}")
    if valid.shape != true.local.shape[:-1] or valid.dtype != torch.bool:
        raise ValueError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}; it must be bool of shape "
            f"{tuple(true.local.shape[:-1])}, one value for each point of true.local"
        )
