"""The terms of predicted surfaces, points and normals, and their gradient, in one pass over the points.

For samples of frames of H x W points, with predicted points p multiplied by the sample's scale s, true points t and
weights w (0: the point is not known), three sums a frame:

    local   sum w |s p - t|, over coordinates, for the points in their own camera
    world   the same for the points in the camera of the first frame
    normal  sum h(angle), over corners of blocks of 2 x 2 points, between the predicted and the true normal

`gasp_fast.g2vlm.losses` defines them in plain PyTorch: h is the Huber loss of an angle that is held between 1 and 90
degrees, and `corners` says which corners count. The gradient is that of

    sum of per_coordinate (local + world) + per_corner normal,

whose factors depend on the truth alone, so it can be written in the pass that computes the sums.

**Normals.** They do not depend on s, and differences of points as they are lose the fewest digits. With e = next -
point and f = previous - point, the normal is n = e x f. Let a hat mark a unit vector and m be the true normal. The
angle is atan2(|n^ x m^|, n^ . m^), and with g = dL/dn

    d angle / dn = (cos n^ - m^) / (sin |n|),    dL/de = f x g,    dL/df = g x e.

**One writer.** A point is a part of four blocks, and in each of the point, the next or the previous of three corners.
The Triton kernel computes these twelve corners for each point and adds up what they give it: nothing is atomic, equal
inputs give equal bits. Each corner is computed three times; that is arithmetic, and the pass stays one reading of all
points. A CPU computes each corner once and adds to three points, frame by frame (`csrc/surfaces.cpp`).

Everything is float32: in bfloat16, neighbouring points of a plane are rounded apart so far that its normals are wrong
by tens of degrees.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton_launch import INTERPRETED, Tile, cdiv, constant, jit, kernel, launch, tl

_surfaces: Any
try:
    _surfaces = importlib.import_module("gasp_fast._surfaces")
except ImportError:  # a source tree that was never built
    _surfaces = None

TILE = Tile(rows=1, columns=128, warps=4)  # a point for each thread
SMALLEST_ANGLE, LARGEST_ANGLE = constant(math.radians(1)), constant(math.radians(90))
HUBER_ANGLE = constant(math.radians(3))
SHORTEST = constant(1e-15)  # normal
QUARTER, EIGHTH_TANGENT = constant(math.pi / 4), constant(math.tan(math.pi / 8))


class Surfaces(NamedTuple):
    """What a pass reads; all dense."""

    local: Tensor  # float32 [S, F, H, W, 3], predicted
    world: Tensor  # float32 [S, F, H, W, 3], predicted
    true_local: Tensor  # float32 [S, F, H, W, 3]
    true_world: Tensor  # float32 [S, F, H, W, 3]
    weight: Tensor  # float32 [S, F, H, W]
    corners: Tensor  # uint8 [S, F, H - 1, W - 1], bit k: corner k of the block counts; clockwise from the upper left
    scale: Tensor  # float32 [S], of predicted points
    per_coordinate: Tensor  # float32 [S], factors of the gradient
    per_corner: Tensor  # float32 [S]


def available(device: torch.device) -> bool:
    """Whether there is a kernel for tensors of this device."""
    return tl is not None if device.type == "cuda" or INTERPRETED else _surfaces is not None and device.type == "cpu"


def surface_terms(surfaces: Surfaces, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sums, float64 [S, 3], and the gradients of `local` and `world`."""
    local = surfaces.local
    samples, frames, height, width, _ = local.shape
    gradients = (torch.empty_like(local), torch.empty_like(local)) if backward else (None, None)
    if local.is_cuda or INTERPRETED:
        pieces = cdiv(height * width, TILE.columns)
        sums = torch.empty(samples, frames * pieces, 3, device=local.device)
        launch(
            terms_of_points, (pieces, samples * frames), TILE,
            *surfaces, sums, *gradients, frames, height, width,
            form=(backward,),
        )  # fmt: skip
        return sums.sum(1, dtype=torch.float64), *gradients
    sums = torch.empty(samples, frames, 3, dtype=torch.float64)
    arrays = [value.detach().numpy() for value in surfaces]
    outputs = [None if gradient is None else gradient.numpy() for gradient in gradients]
    _surfaces.surface_terms(*arrays, sums.numpy(), *outputs, torch.get_num_threads())
    return sums.sum(1), *gradients


@kernel("sums", "local_gradient", "world_gradient", direct=True)
def terms_of_points(
    local, world, true_local, true_world, weight, corners, scale, per_coordinate, per_corner,
    sums, local_gradient, world_gradient, frames, height, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: some points of one frame. `local_gradient` and `world_gradient` are None where none is wanted."""
    frame = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    here = i < height * width
    y, x = i // width, i % width
    by = tl.load(scale + frame // frames)
    share, corner_share = tl.load(per_coordinate + frame // frames), tl.load(per_corner + frame // frames)
    first = frame * height * width

    px, py, pz = point(local, first, y, x, height, width)
    tx, ty, tz = point(true_local, first, y, x, height, width)
    w = tl.load(weight + first + i, mask=here, other=0.0)
    dx, dy, dz = by * px - tx, by * py - ty, by * pz - tz
    local_sum = w * (tl.abs(dx) + tl.abs(dy) + tl.abs(dz))
    slope = share * w * by
    gx, gy, gz = slope * sign(dx), slope * sign(dy), slope * sign(dz)

    # The four blocks around the point, which is their corner 0, 1, 2 and 3.
    loss, nx, ny, nz = around(local, true_local, corners, frame, y, x, 0, 1, height, width, 0)
    more, bx, by_, bz = around(local, true_local, corners, frame, y, x, 1, 0, height, width, 1)
    loss, nx, ny, nz = loss + more, nx + bx, ny + by_, nz + bz
    more, bx, by_, bz = around(local, true_local, corners, frame, y, x, 0, -1, height, width, 2)
    loss, nx, ny, nz = loss + more, nx + bx, ny + by_, nz + bz
    more, bx, by_, bz = around(local, true_local, corners, frame, y, x, -1, 0, height, width, 3)
    loss, nx, ny, nz = loss + more, nx + bx, ny + by_, nz + bz

    qx, qy, qz = point(world, first, y, x, height, width)
    ux, uy, uz = point(true_world, first, y, x, height, width)
    ux, uy, uz = by * qx - ux, by * qy - uy, by * qz - uz
    world_sum = w * (tl.abs(ux) + tl.abs(uy) + tl.abs(uz))
    to = sums + 3 * (frame * tl.num_programs(0) + tl.program_id(0))
    tl.store(to, tl.sum(local_sum, 0))
    tl.store(to + 1, tl.sum(world_sum, 0))
    tl.store(to + 2, tl.sum(tl.where(here, loss, 0.0), 0))
    if local_gradient is not None:
        at = 3 * (first + i)
        tl.store(local_gradient + at, gx + corner_share * nx, mask=here)
        tl.store(local_gradient + at + 1, gy + corner_share * ny, mask=here)
        tl.store(local_gradient + at + 2, gz + corner_share * nz, mask=here)
        tl.store(world_gradient + at, slope * sign(ux), mask=here)
        tl.store(world_gradient + at + 1, slope * sign(uy), mask=here)
        tl.store(world_gradient + at + 2, slope * sign(uz), mask=here)


@jit
def point(points, first, y, x, height, width):
    """The coordinates of a point of a frame; 0 outside of the frame."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = 3 * (first + y * width + x)
    a = tl.load(points + at, mask=inside, other=0.0)
    b = tl.load(points + at + 1, mask=inside, other=0.0)
    c = tl.load(points + at + 2, mask=inside, other=0.0)
    return a, b, c


@jit
def block(corners, frame, y, x, height, width):
    """Which corners of the block with this upper left point count; none for a block that is not whole."""
    inside = (y >= 0) & (y < height - 1) & (x >= 0) & (x < width - 1)
    at = frame * (height - 1) * (width - 1) + y * (width - 1) + x
    return tl.load(corners + at, mask=inside, other=0).to(tl.int32)


@jit
def sign(value):
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))


@jit
def around(
    local, true_local, corners, frame, y, x, down: tl.constexpr, right: tl.constexpr, height, width,
    number: tl.constexpr,
):  # fmt: skip
    """What one block gives to point a at (y, x), which has this number in it.

    Clockwise, the block has the points a, b, c, d, and b lies `down` and `right` of a. Turned by 90 degrees, that is
    the way from b to c. Returns the loss of corner a, and the gradient of a from the corners a, b and d.
    """
    first = frame * height * width
    by_, bx_, dy_, dx_ = y + down, x + right, y + right, x - down
    cy_, cx_ = by_ + right, bx_ - down
    ax, ay, az = point(local, first, y, x, height, width)
    bx, by, bz = point(local, first, by_, bx_, height, width)
    cx, cy, cz = point(local, first, cy_, cx_, height, width)
    dx, dy, dz = point(local, first, dy_, dx_, height, width)
    tax, tay, taz = point(true_local, first, y, x, height, width)
    tbx, tby, tbz = point(true_local, first, by_, bx_, height, width)
    tcx, tcy, tcz = point(true_local, first, cy_, cx_, height, width)
    tdx, tdy, tdz = point(true_local, first, dy_, dx_, height, width)
    bits = block(corners, frame, tl.minimum(y, cy_), tl.minimum(x, cx_), height, width)
    own = (bits >> number) & 1 != 0
    after, before = (bits >> ((number + 1) % 4)) & 1 != 0, (bits >> ((number + 3) % 4)) & 1 != 0
    loss, ex, ey, ez, fx, fy, fz = corner(
        bx - ax, by - ay, bz - az, dx - ax, dy - ay, dz - az,
        tbx - tax, tby - tay, tbz - taz, tdx - tax, tdy - tay, tdz - taz, own,
    )  # fmt: skip
    gx, gy, gz = -ex - fx, -ey - fy, -ez - fz
    _, ex, ey, ez, fx, fy, fz = corner(  # a is before b
        cx - bx, cy - by, cz - bz, ax - bx, ay - by, az - bz,
        tcx - tbx, tcy - tby, tcz - tbz, tax - tbx, tay - tby, taz - tbz, after,
    )  # fmt: skip
    gx, gy, gz = gx + fx, gy + fy, gz + fz
    _, ex, ey, ez, fx, fy, fz = corner(  # a is after d
        ax - dx, ay - dy, az - dz, cx - dx, cy - dy, cz - dz,
        tax - tdx, tay - tdy, taz - tdz, tcx - tdx, tcy - tdy, tcz - tdz, before,
    )  # fmt: skip
    return loss, gx + ex, gy + ey, gz + ez


@jit
def corner(ex, ey, ez, fx, fy, fz, tex, tey, tez, tfx, tfy, tfz, counts):
    """The loss of the angle between e x f and te x tf, and its gradients with respect to e and f; 0 if not counted."""
    nx, ny, nz, length = unit_cross(ex, ey, ez, fx, fy, fz)
    mx, my, mz, _ = unit_cross(tex, tey, tez, tfx, tfy, tfz)
    exists = length > SHORTEST
    sx, sy, sz = ny * mz - nz * my, nz * mx - nx * mz, nx * my - ny * mx
    sine, cosine = tl.sqrt(sx * sx + sy * sy + sz * sz), nx * mx + ny * my + nz * mz
    angle = tl.where(exists, angle_of(sine, cosine), LARGEST_ANGLE)
    held = tl.minimum(tl.maximum(angle, SMALLEST_ANGLE), LARGEST_ANGLE)
    loss = tl.where(held < HUBER_ANGLE, held * held / (2 * HUBER_ANGLE), held - HUBER_ANGLE / 2)
    slope = tl.where(angle < HUBER_ANGLE, angle / HUBER_ANGLE, 1.0)
    changes = counts & exists & (angle >= SMALLEST_ANGLE) & (angle < LARGEST_ANGLE)
    slope = tl.where(changes, slope / tl.where(changes, sine * length, 1.0), 0.0)
    gx, gy, gz = slope * (cosine * nx - mx), slope * (cosine * ny - my), slope * (cosine * nz - mz)
    return (
        tl.where(counts, loss, 0.0),
        fy * gz - fz * gy, fz * gx - fx * gz, fx * gy - fy * gx,
        gy * ez - gz * ey, gz * ex - gx * ez, gx * ey - gy * ex,
    )  # fmt: skip


@jit
def unit_cross(ax, ay, az, bx, by, bz):
    """The direction of a x b, and its length."""
    x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = tl.sqrt(x * x + y * y + z * z)
    inverse = 1.0 / tl.maximum(length, SHORTEST)
    return x * inverse, y * inverse, z * inverse, length


@jit
def angle_of(sine, cosine):
    """atan2 for a sine of at least 0, up to 90 degrees; any angle above is 90 degrees.

    The arc tangent of r <= tan(22.5 degrees) is a polynomial (that of Cephes, within 2 units in the last place); larger
    ratios are turned back by 45 degrees, ratios above 1 are mirrored.
    """
    steep = sine > cosine
    low, high = tl.where(steep, cosine, sine), tl.where(steep, sine, cosine)
    ratio = tl.maximum(low, 0.0) / tl.maximum(high, SHORTEST)
    turned = ratio > EIGHTH_TANGENT
    r = tl.where(turned, (ratio - 1.0) / (ratio + 1.0), ratio)
    z = r * r
    angle = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    angle = angle * z * r + r + tl.where(turned, QUARTER, 0.0)
    return tl.where(steep, LARGEST_ANGLE - angle, angle)
