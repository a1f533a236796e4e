"""Powers of two that bring numbers into the range of float16: what the products take, and the gradients they leave.

A float32 times a power of two is not rounded, so the power can be divided out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fp16_boost(upstream: Sequence[Tensor], temperature: Tensor) -> Tensor | None:
    """[G] powers of two that bring `X` near 1, or None without upstream gradients, each [G, ...].

    In a mean over many matches `weight / tau` is below the smallest number that float16 has. Upstream gradients are
    multiplied by the boost, the results of the products divided by it.
    """
    if not upstream or any(value.numel() == 0 for value in upstream):
        return None
    largest = torch.stack([value.abs().flatten(1).amax(1) for value in upstream]).amax(0)  # [G]
    return (largest / temperature).clamp(1e-30, 1e30).log2().round().neg().exp2()


def fp16_scale(upstream: Sequence[Tensor], temperature: Tensor, inverse_norms: Tensor) -> Tensor:
    """[L] powers of two that bring the gradient of embeddings into the range of float16.

    The gradient of a mean is about `weight / (tau |e|)`, often below 1e-5, where float16 has few digits or none. A
    caller's loss scale comes too late for a gradient that was rounded in the forward pass, so it is stored larger.
    """
    boost = fp16_boost(upstream, temperature)
    if inverse_norms.numel() == 0:
        return inverse_norms.new_ones(inverse_norms.shape[0])
    norm = inverse_norms.median(dim=1).values.reciprocal().clamp(2.0**-20, 2.0**20).log2().round().exp2()
    return norm if boost is None else norm * boost
