"""From hidden states of patches to geometry: points of each frame, camera poses, and points in the camera of frame 0.

Each of the three branches has a decoder of its own, of five blocks (`head_blocks`).

    hidden [B, F, P, D] ─┬─> decoder ──> points:  z = exp(c), (x, y) = (a, b) z, of each pixel of each patch
                         ├─> decoder ──> residual MLPs, mean over patches, MLP ──> translation, matrix ──> rotation
                         └─> decoder with attention to frame 0 ──> points in the camera of frame 0

Names and shapes of the weights, and what is computed of them, are those of the authors, whose weights then fit: the
values of a patch come by coordinate (a, b, c), row and column; the nine values of a rotation are the rows of a matrix,
each of which is scaled to length 1 before the nearest rotation is taken; the third branch gives x, y and z themselves.

Poses are returned as maps to the camera of frame 0, whose own pose is the identity. The third branch stabilises
training and is not used in evaluation mode: its points follow from the other two, `R local + t`.

Everything is float32, under autocast too: points rounded to bf16 are off by up to 1 / 256, more than the difference
between neighbours, and normals by tens of degrees. The key `compute` is the precision of the products in the decoders'
blocks alone. The layers after them use IEEE float32, even if the process allows tf32.

New heads show each patch as a small square at depth 1 that faces the camera, and poses near the identity:

- The gradient of the normal loss grows as neighbouring points come closer, and outweighs all other terms where points
  are placed at random first. On one scene of 3 frames of 16 patches the local term was 0.23 after 1,500 steps, as
  without any fit; from the squares it was 0.05, and without the normal loss below 0.01 after 200 steps. (Measured
  before the heads had the authors' structure.)
- The matrix starts near one with three singular values of 1, far from where the nearest rotation jumps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.config.limits import check_whole
from gasp_fast.supervision.precision import Compute, PrecisionLinear, matmul_precision

from .head_blocks import Decoder, Turns, turns_of
from .losses import Geometry
from .rotation import nearest_rotation

INITIAL = 0.002  # standard deviation of the weights that give poses
INITIAL_PATCH = 1 / 16  # side of a patch at depth 1: 16 of them span 53 degrees
SHORTEST = 1e-3  # of a row of the matrix: shorter ones are divided by it, which bounds the gradient
LARGEST_LOG_DEPTH = 15.0  # exp of it is 3e6: one wild pixel must not become infinite


@dataclass(frozen=True)
class HeadsConfig:
    """The defaults are the sizes of the authors' model."""

    hidden: int = 1536  # width of the hidden states
    width: int = 1536  # of the blocks
    layers: int = 5  # blocks of each decoder
    heads: int = 16
    point_width: int = 1024  # of what points are made of
    camera_width: int = 512
    camera_layers: int = 2  # residual MLPs
    patch: int = 14  # pixels
    rope_base: float = 100.0
    with_world: bool = True  # the branch of points in the camera of frame 0, used in training mode
    compute: Compute = "fp32"  # precision of the products in the decoders
    checkpointing: bool = False  # recompute the blocks in the backward pass

    def __post_init__(self) -> None:
        sizes = ("hidden", "width", "heads", "point_width", "camera_width", "patch")
        check_whole(self, (*sizes, "layers", "camera_layers"), "heads.")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"heads.width = {self.width} must be a multiple of 4 * heads.heads = {4 * self.heads}: in each "
                "attention head pairs of dimensions rotate by the row, and as many by the column"
            )
        if not 0 < self.rope_base < math.inf:
            raise ValueError(f"heads.rope_base = {self.rope_base} must be positive and finite; 100 in the paper")

    def decoder(self, out: int, to_first: bool = False) -> Decoder:
        return Decoder(
            self.hidden, self.width, out, self.layers, self.heads, to_first, self.compute, self.checkpointing
        )


class GeometryHeads(nn.Module):
    def __init__(self, config: HeadsConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HeadsConfig()
        self.point_decoder, self.point_head = config.decoder(config.point_width), PixelHead(config)
        self.camera_decoder, self.camera_head = config.decoder(config.camera_width), CameraHead(config)
        if config.with_world:
            self.global_points_decoder = config.decoder(config.point_width, to_first=True)
            self.global_point_head = PixelHead(config)
            with torch.no_grad():  # z = 1
                self.global_point_head.proj.bias.view(3, -1)[2] = 1

    def forward(self, hidden: Tensor, rows: int, columns: int) -> Geometry:
        """[B, F, rows * columns, hidden] -> Geometry with H = rows * patch, W = columns * patch."""
        self._check(hidden, rows, columns)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            turns = self._turns(rows, columns, hidden.device)
            local = from_rays(self.point_head(self.point_decoder(hidden, turns), rows, columns))
            rotation, translation = poses_in_first(*self.camera_head(self.camera_decoder(hidden, turns)))
            if self.training and self.config.with_world:
                world = self.global_point_head(self.global_points_decoder(hidden, turns), rows, columns)
            else:
                world = moved(local, rotation, translation)
        return Geometry(local, world, rotation, translation)

    def _turns(self, rows: int, columns: int, device: torch.device) -> Turns:
        patch = torch.arange(rows * columns, device=device)
        dimensions = self.config.width // self.config.heads
        return turns_of(patch // columns, patch % columns, dimensions, self.config.rope_base)

    def _check(self, hidden: Tensor, rows: int, columns: int) -> None:
        if hidden.ndim != 4 or hidden.shape[2:] != (rows * columns, self.config.hidden):
            raise ValueError(
                f"hidden has the shape {tuple(hidden.shape)}; with rows = {rows} and columns = {columns} it must be "
                f"[B, F, {rows * columns}, {self.config.hidden}]"
            )
        stored = self.point_head.proj.weight.dtype
        if stored != torch.float32:
            raise TypeError(f"the heads' weights are {stored}; keep them in float32: narrower ones distort normals")


class PixelHead(nn.Module):
    """Three numbers for each pixel: [B, F, P, point_width] -> [B, F, H, W, 3]."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = PrecisionLinear(config.point_width, 3 * config.patch**2, "fp32")
        nn.init.zeros_(self.proj.weight)
        with torch.no_grad():
            self.proj.bias.copy_(facing_square(config.patch))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        return pixels_of_patches(self.proj(x), rows, columns, self.patch)


class CameraHead(nn.Module):
    """A pose for each frame, in no particular frame: [B, F, P, camera_width] -> [B, F, 3, 3], [B, F, 3]."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        width = config.camera_width
        self.res_conv = nn.ModuleList(ResidualMLP(width) for _ in range(config.camera_layers))
        self.more_mlps = nn.Sequential(
            PrecisionLinear(width, width, "fp32"), nn.ReLU(), PrecisionLinear(width, width, "fp32"), nn.ReLU()
        )
        self.fc_t = PrecisionLinear(width, 3, "fp32")
        self.fc_rot = PrecisionLinear(width, 9, "fp32")
        for last, start in ((self.fc_t, torch.zeros(3)), (self.fc_rot, torch.eye(3).flatten())):
            nn.init.normal_(last.weight, std=INITIAL)
            with torch.no_grad():
                last.bias.copy_(start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.res_conv:
            x = layer(x)
        x = self.more_mlps(x.mean(2))  # [B, F, camera_width]
        matrix = F.normalize(self.fc_rot(x).unflatten(-1, (3, 3)), dim=-1, eps=SHORTEST)
        return nearest_rotation(matrix), self.fc_t(x)


class ResidualMLP(nn.Module):
    """Of each patch. The names are those of convolutions of 1 x 1, which the authors' layers were once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (PrecisionLinear(width, width, "fp32") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.res_conv1, self.res_conv2, self.res_conv3):
            y = F.relu(layer(y))
        return x + y


def facing_square(patch: int) -> Tensor:
    """x, y and 0 of each pixel of a patch, ordered as the values of a patch are: [3 patch²]."""
    place = INITIAL_PATCH * ((torch.arange(patch) + 0.5) / patch - 0.5)
    y, x = torch.meshgrid(place, place, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).flatten()


def pixels_of_patches(values: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """[B, F, P, 3 patch²] -> [B, F, H, W, 3]. The values of a patch are ordered by coordinate, row and column."""
    samples, frames = values.shape[:2]
    values = values.view(samples, frames, rows, columns, 3, patch, patch)
    return values.permute(0, 1, 2, 5, 3, 6, 4).reshape(samples, frames, rows * patch, columns * patch, 3)


def from_rays(values: Tensor) -> Tensor:
    """(a, b, c) -> (a z, b z, z) with z = exp(c): [..., 3] -> [..., 3]."""
    z = values[..., 2:].clamp(-LARGEST_LOG_DEPTH, LARGEST_LOG_DEPTH).exp()
    return torch.cat([values[..., :2] * z, z], -1)


def poses_in_first(rotation: Tensor, translation: Tensor) -> tuple[Tensor, Tensor]:
    """Poses as maps to the camera of frame 0: [B, F, 3, 3], [B, F, 3] -> the same shapes."""
    to_first = rotation[:, :1].mT
    shift = translation - translation[:, :1]
    identity = torch.eye(3, device=rotation.device).expand_as(to_first)
    with matmul_precision("ieee"):
        turned = torch.cat([identity, to_first @ rotation[:, 1:]], 1)
        return turned, (to_first @ shift[..., None]).squeeze(-1)


def moved(points: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    """Points of each camera in the camera of frame 0: [B, F, H, W, 3] -> [B, F, H, W, 3]."""
    with matmul_precision("ieee"):
        return points @ rotation.mT[:, :, None] + translation[:, :, None, None]
