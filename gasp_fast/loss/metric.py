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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import checked_embeddings


class InMetric(NamedTuple):
    """What `in_metric` returns; each a list with one tensor for each of the embeddings."""

    embeddings: list[Tensor]  # as given, [L, N, K] or [N, K]
    metrics: list[Tensor]  # [L, K, K] or [K, K]
    coordinates: list[Tensor]  # the embeddings, for engines: their gradients are coefficients `c`
    duals: list[Tensor]  # need no gradient


def in_metric(embeddings: Tensor | Sequence[Tensor], metric: Tensor | Sequence[Tensor]) -> InMetric:
    """Embeddings [L, N, K] whose inner products are `e_i . metric e_k`; to be passed to `gasp_loss` in their place.

    `metric` is `W^T W` [L, K, K], symmetric, where the embeddings stand for `W e`. Both may be a single layer, or lists
    of layers. Both get their gradients. That of the metric is exact in its symmetric part, the only one that counts.
    """
    layers, metrics = checked_embeddings(embeddings), checked_embeddings(metric, "metric")
    if layers[0].dtype == torch.float16:
        raise TypeError("embeddings has dtype float16, whose range their duals leave; pass bfloat16 or float32")
    if len(layers) > 1 and len(metrics) == 1 and metrics[0].dim() == 3:
        metrics = list(metrics[0].unbind())
    shapes = [(*layer.shape[:-2], layer.shape[-1], layer.shape[-1]) for layer in layers]
    if [tuple(one.shape) for one in metrics] != shapes:
        raise ValueError(
            f"metric has {len(metrics)} tensor(s) with shape {list(metrics[0].shape)}; these embeddings need "
            f"{len(shapes)} with shape {list(shapes[0])}: W^T W of each layer"
        )
    if metrics[0].device != layers[0].device:
        raise ValueError(f"metric lies on {metrics[0].device}, embeddings on {layers[0].device}; move it there")
    both = _Coordinates.apply(len(layers), *layers, *metrics)
    return InMetric(layers, metrics, list(both[: len(layers)]), list(both[len(layers) :]))


class _Coordinates(torch.autograd.Function):
    """(*embeddings, *metrics) to (*embeddings, *duals); backward, coefficients to gradients."""

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
        saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access
        count, needed = len(saved) // 2, ctx.needs_input_grad[1:]
        layers, metrics = saved[:count], saved[count:]
        of_layers: list[Tensor | None] = [None] * count
        of_metrics: list[Tensor | None] = [None] * count
        with torch.autocast(layers[0].device.type, enabled=False):
            for at, (x, metric, c) in enumerate(zip(layers, metrics, coefficients, strict=False)):
                if needed[at]:
                    of_layers[at] = c @ metric.to(x.dtype)
                if needed[count + at]:
                    of_metrics[at] = ((c.mT @ x) / 2).to(metric.dtype)
        return None, *of_layers, *of_metrics
