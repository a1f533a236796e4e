"""Predicted and true surfaces, and their dense terms with gradients, by the fused kernels or by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gasp_fast.g2vlm.dense import dense_terms
from gasp_fast.g2vlm.losses import counted_corners, depth_weight, plain_terms

Terms = Callable[..., tuple[Tensor, Tensor]]


def drawn_surfaces(seed: int, samples: int, frames: int, height: int, width: int, noise: float) -> list[Tensor]:
    """The arguments of `dense_terms`: bumpy surfaces with a step, holes and a blunt prediction, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = samples, frames, height, width

    def draw(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator, dtype=torch.float64)

    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    depth = 3 + 0.02 * torch.sin(3 * x) + 0.03 * y + 0.002 * draw()
    depth[..., width // 2 :] += 0.5
    true = torch.stack([x.expand(shape), y.expand(shape), depth], -1).double()
    true_world = true + draw(3)
    valid = torch.rand(shape, generator=generator) < 0.9
    predicted, world = (true + noise * draw(3)) / 2, (true_world + noise * draw(3)) / 2
    predicted[:, :, : height // 3, : width // 3] = 0.5  # points that coincide
    with_normals = torch.arange(samples) % 3 != 2
    scale = 2 + 0.1 * torch.rand(samples, generator=generator, dtype=torch.float64)
    weight = depth_weight(true[..., 2], valid)
    return [predicted, world, true, true_world, weight, counted_corners(true, valid), with_normals, scale]


def results(terms: Terms, arguments: list[Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both results, and the gradients for an upstream gradient that differs between the samples."""
    rounded = [value.float() if value.is_floating_point() else value for value in arguments]
    given = [value.to(device, dtype) if value.is_floating_point() else value.to(device) for value in rounded]
    local, world = (value.requires_grad_() for value in given[:2])
    dense, parts = terms(local, world, *given[2:])
    upstream = torch.linspace(1, 2, len(dense), dtype=dense.dtype, device=device)
    dense.backward(upstream)
    assert local.grad is not None and world.grad is not None
    return {"dense": dense.detach(), "parts": parts.detach(), "local": local.grad, "world": world.grad}


def fused_equals_plain(device: str, arguments: list[Tensor], tolerance: float = 1e-5) -> None:
    """The fused kernels against plain PyTorch in float64.

    A gradient is compared in the sum over its numbers: an angle near 1 or 90 degrees may be rounded to the other side.
    """
    ours = results(dense_terms, arguments, device, torch.float32)
    truth = results(plain_terms, arguments, "cpu", torch.float64)
    for name, value in truth.items():
        error = (ours[name].cpu().double() - value).abs().sum() / value.abs().sum()
        assert error <= (tolerance if name in ("dense", "parts") else 10 * tolerance), (name, float(error))
