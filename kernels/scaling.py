"""Multiplies gradients by a number that is on the device: in place, or on their way to other rows.

In place, nothing is done where that number is 1.

The gradient of a mean or sum is complete after the forward pass, up to the upstream gradient. That is 1 for a loss that
is differentiated by itself, and then there is nothing to do. The host does not know it, so the kernel is launched in
any case: each program reads the number first and ends if it is 1. Otherwise the gradients are read and written once, at
the speed of memory; products are taken in float32.
"""

from __future__ import annotations

from torch import Tensor

from .triton_launch import INTERPRETED, Tile, cdiv, launch, tl
from .vector_kernels import place_rows, scale

# 4096 numbers of two bytes are four 16-byte loads for each of 128 threads.
TILE = Tile(rows=1, columns=4096, warps=4)
ROW_TILE = Tile(rows=4, columns=1024, warps=4)


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


def place_scaled(rows: Tensor, factor: Tensor, index: Tensor, out: Tensor) -> None:
    """`out[index] = factor * rows`: [R, D], float32 [], int64 [R] without repetition, dense [N, D]. Rounded once."""
    count, width = rows.shape
    if not (rows.is_cuda or INTERPRETED) or tl is None or rows.stride(1) != 1:
        out.index_copy_(0, index, (rows * factor).to(out.dtype))
        return
    bits = 8 | width | rows.stride(0) | rows.data_ptr() // rows.element_size() | out.data_ptr() // out.element_size()
    launch(
        place_rows, (cdiv(count, ROW_TILE.rows), cdiv(width, ROW_TILE.columns)), ROW_TILE,
        rows, rows.stride(0), factor, index, out, out.stride(0), count, width,
        form=(rows.dtype, out.dtype),
        ALIGN=bits & -bits,
    )  # fmt: skip
