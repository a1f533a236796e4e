"""The terms of each point (local, world, normal) through the fused kernels, differentiable.

`losses` defines them. Here the pass that computes the sums also writes the gradient, up to the upstream gradient of
each sample, by which backward multiplies it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gasp_fast.kernels.scaling import scale_in_place
from gasp_fast.kernels.surfaces import Surfaces, surface_terms


class DenseTerms(torch.autograd.Function):
    """(total, terms): local + world + normal of each sample [S], and these three [3, S] without gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, world: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        surfaces = Surfaces(local, world, *others)
        sums, *gradients = surface_terms(surfaces, backward=any(ctx.needs_input_grad[:2]))
        ctx.scaled = False
        ctx.save_for_backward(*surfaces, *(gradient for gradient in gradients if gradient is not None))
        factors = surfaces.per_coordinate, surfaces.per_coordinate, surfaces.per_corner
        terms = (sums.T * torch.stack(factors)).float()
        ctx.mark_non_differentiable(terms)
        return terms.sum(0), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, local, world = ctx.saved_tensors
        if ctx.scaled:  # a second backward over a retained graph: the first one scaled the gradients in place
            _, local, world = surface_terms(Surfaces(*inputs), backward=True)
        ctx.scaled = True
        for gradient in (local, world):
            scale_in_place(gradient.data, upstream.contiguous())
        needs = ctx.needs_input_grad
        return local if needs[0] else None, world if needs[1] else None, *[None] * (len(needs) - 2)


def dense_terms(
    local: Tensor,  # float32 [S, F, H, W, 3], predicted, in a unit of its own
    world: Tensor,
    true_local: Tensor,
    true_world: Tensor,
    weight: Tensor,  # float32 [S, F, H, W], 0: not known
    counted: Tensor,  # bool [4, S, F, H - 1, W - 1], corners whose normals are compared
    with_normals: Tensor | None,  # bool [S]
    scale: Tensor,  # float32 [S]
) -> tuple[Tensor, Tensor]:
    """What `DenseTerms` returns."""
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=local.device).view(4, 1, 1, 1, 1)
    corners = (counted * bits).sum(0, dtype=torch.uint8)
    points = (weight > 0).flatten(1).sum(1)  # [S]
    per_corner = 1 / counted.sum((0, 2, 3, 4)).clamp(min=1).float()
    if with_normals is not None:
        per_corner = torch.where(with_normals, per_corner, 0)
    truth = (true_local.contiguous(), true_world.contiguous(), weight.contiguous(), corners)
    per_coordinate = 1 / (3 * points.clamp(min=1)).float()
    return DenseTerms.apply(local.contiguous(), world.contiguous(), *truth, scale, per_coordinate, per_corner)
