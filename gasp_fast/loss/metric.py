"""Embeddings that stand for longer vectors: cosines in a metric.

Embeddings `x` of width K may stand for vectors `e = W x` of a larger width D, as after a linear layer. With the metric
`G = W^T W`, symmetric and [K, K], all inner products are known without the `e`:

    e_i . e_k = x_i . G x_k = x_i . x'_k        x' = G x, the duals

so a loss of cosines takes products of width K instead of D. The engines return coefficients `c` [N, K] with
`dL/de_i = W c_i` (`kernels/chunked.py`), from which follow

    dL/dx_i = W^T dL/de_i = G c_i
    dL/dW   = sum_i dL/de_i x_i^T = W sum_i c_i x_i^T

Autograd makes `W (dG + dG^T)` of a gradient `dG` of the metric, so `dG = (sum_i c_i x_i^T) / 2`.

`x . G x` is small where a large part of `x` lies in directions that `W` maps to nearly 0, and in 16 bits such a
difference of large numbers is lost. If all tokens share that part, subtract it first (`supervision/heads.py` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import checked_embeddings


def checked_metric(metric: Tensor | Sequence[Tensor] | None, layers: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    """One metric for each tensor of `layers`, [L, K, K] or [K, K]; an empty list where there is none."""
    if metric is None:
        return []
    if keys:
        raise ValueError("metric and keys are both given; a metric needs anchors and candidates from the same tensor")
    if layers[0].dtype == torch.float16:
        raise TypeError("embeddings has dtype float16, whose range duals leave; with metric, pass bfloat16 or float32")
    found = checked_embeddings(metric, "metric")
    if len(layers) > 1 and len(found) == 1 and found[0].dim() == 3:
        found = list(found[0].unbind())
    shapes = [(*layer.shape[:-2], layer.shape[-1], layer.shape[-1]) for layer in layers]
    if [tuple(one.shape) for one in found] != shapes:
        raise ValueError(
            f"metric has {len(found)} tensor(s) with shape {list(found[0].shape)}; embeddings need {len(shapes)} with "
            f"shape {list(shapes[0])}: symmetric, one for each layer"
        )
    if found[0].device != layers[0].device:
        raise ValueError(f"metric lies on {found[0].device}, embeddings on {layers[0].device}; move it there")
    return found


def with_duals(layers: list[Tensor], metrics: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The embeddings, whose gradients may be given as coefficients `c`, and their duals, which need none."""
    both = _Coordinates.apply(len(layers), *layers, *metrics)
    return list(both[: len(layers)]), list(both[len(layers) :])


class _Coordinates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        layers, metrics = tensors[:count], tensors[count:]
        ctx.save_for_backward(*tensors)
        with torch.autocast(layers[0].device.type, enabled=False):
            duals = [x @ metric.to(x.dtype) for x, metric in zip(layers, metrics, strict=True)]
        ctx.mark_non_differentiable(*duals)
        return *(x.view_as(x) for x in layers), *duals

    @staticmethod
    def backward(ctx: Any, *coefficients: Tensor) -> tuple[Any, ...]:
        count, needed = len(ctx.saved_tensors) // 2, ctx.needs_input_grad[1:]
        layers, metrics = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        of_layers: list[Tensor | None] = [None] * count
        of_metrics: list[Tensor | None] = [None] * count
        with torch.autocast(layers[0].device.type, enabled=False):
            for at, (x, metric, c) in enumerate(zip(layers, metrics, coefficients, strict=False)):
                if needed[at]:
                    of_layers[at] = c @ metric.to(x.dtype)
                if needed[count + at]:
                    of_metrics[at] = ((c.mT @ x) / 2).to(metric.dtype)
        return None, *of_layers, *of_metrics
