"""The rotation nearest to a 3 x 3 matrix, with a gradient that stays finite.

With the singular value decomposition M = U S V^T, the rotation nearest to M in the Frobenius norm is

    R = U D V^T,    D = diag(1, 1, det(U) det(V)).

PyTorch differentiates U and V one by one, which divides by s_i - s_j. It fails where singular values are equal, as they
are for every rotation. The product has no such poles. Write V' = V D and s' = (s_1, s_2, +-s_3) with the sign of D;
then M = U diag(s') V'^T and R = U V'^T. For a change dM, U^T dR V' is antisymmetric, and

    (U^T dR V')_ij = (A - A^T)_ij / (s'_i + s'_j),    A = U^T dM V'.

The map from dM to dR is its own adjoint, so the gradient of M is that formula with the gradient of R in the place of
dM. Its poles are at s'_i + s'_j = 0: matrices of rank 1, and reflections with s_2 = s_3. There the nearest rotation
itself jumps; the denominator is held above a small part of s_1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-3  # of s_1: the smallest denominator


class NearestRotation(torch.autograd.Function):
    """[..., 3, 3] -> [..., 3, 3], in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        u, singular, vt = torch.linalg.svd(matrix)
        sign = torch.linalg.det(u) * torch.linalg.det(vt)  # [...], 1 or -1
        signs = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign.sign()], -1)  # [..., 3]
        vt, singular = signs[..., None] * vt, signs * singular
        ctx.save_for_backward(u, singular, vt)
        return u @ vt

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        u, singular, vt = ctx.saved_tensors
        a = u.mT @ upstream @ vt.mT  # [..., 3, 3]
        total = singular[..., :, None] + singular[..., None, :]
        least = SMALLEST * singular[..., :1, None].clamp(min=torch.finfo(singular.dtype).tiny / SMALLEST)
        return u @ ((a - a.mT) / total.maximum(least)) @ vt


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation nearest to each matrix: [..., 3, 3] of any float type -> float32, or float64 for float64."""
    if matrix.shape[-2:] != (3, 3):
        raise ValueError(f"matrix has the shape {tuple(matrix.shape)}; nearest_rotation takes [..., 3, 3]")
    return NearestRotation.apply(matrix if matrix.dtype == torch.float64 else matrix.float())


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle of the rotation from one to the other, in radians: [..., 3, 3], [..., 3, 3] -> [...].

    It is the acos of (trace - 1) / 2, computed from sine and cosine: the gradient is finite at equal rotations (0) and
    at half a turn.
    """
    relative = a.mT @ b
    cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    skew = relative - relative.mT
    axis = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1) / 2  # [..., 3], of length sine
    return torch.atan2(torch.linalg.vector_norm(axis, dim=-1), cosine)
