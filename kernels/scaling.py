"""Multiplies gradients in place by a number that is on the device; does nothing where that number is 1.

The gradient of a mean or sum is complete after the forward pass, up to the upstream gradient. That is 1 for a loss that
is differentiated by itself, and then there is nothing to do. The host does not know it, so the kernel is launched in
any case: each program reads the number first and ends if it is 1. Otherwise the gradients are read and written once, at
the speed of memory; products are taken in float32.
"""

from __future__ import annotations

from torch import Tensor

from .triton_launch import INTERPRETED, Tile, cdiv, launch, tl
from .vector_kernels import scale

# 4096 numbers of two bytes are four 16-byte loads for each of 128 threads.
TILE = Tile(rows=1, columns=4096, warps=4)


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    """`values *= factor`: contiguous [L, ...] by float32 [L], or any shape by float32 [1]."""
    layers = factor.shape[0]
    if not (values.is_cuda or INTERPRETED) or tl is None:
        if layers > 1 or values.device.type != "cpu" or float(factor) != 1.0:
            values.mul_(factor.view(layers, *[1] * (values.dim() - 1)) if layers > 1 else factor)
        return
    count = values.numel() // layers
    bits = 8 | count | values.data_ptr() // values.element_size()
    launch(
        scale, (cdiv(count, TILE.columns), layers), TILE,
        values, factor, factor.stride(0), count,
        ALIGN=bits & -bits,
    )  # fmt: skip
