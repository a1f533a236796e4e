"""Linear layers with fp32 weights whose matrix products run at a chosen precision.

    "fp32"  IEEE single precision, even if the process allows tf32
    "tf32"  tensor-core products with 10-bit mantissas (same as "fp32" on a CPU)
    "bf16"  inputs and weights rounded to bf16 for the product; the output is bf16

The choice holds in the forward and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Compute = Literal["fp32", "tf32", "bf16"]


class PrecisionLinear(nn.Linear):
    """A linear layer with fp32 weights whose products run at the precision `compute`.

    A module rather than a function of the parent's parameters, because ZeRO-3 gathers weights by module.
    """

    def __init__(self, in_features: int, out_features: int, compute: Compute) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        if self.compute == "bf16":
            return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())
        precision = "ieee" if self.compute == "fp32" else "tf32"
        return _SinglePrecisionLinear.apply(x.float(), self.weight.float(), self.bias.float(), precision)


class _SinglePrecisionLinear(torch.autograd.Function):
    """`F.linear` on fp32 tensors, with all three products at one precision.

    The precision of cuBLAS is a process-wide switch, and autograd runs the backward products long after the forward
    call has returned. So the switch must be set again there; this is the only reason for this function.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.precision = precision
        with matmul_precision(precision):
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [N, out]
        with matmul_precision(ctx.precision):
            grad_x = grad @ weight if needs_x else None
            grad_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None, None


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Run cuBLAS products of fp32 tensors as "ieee" or "tf32", then restore the setting of the process."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
