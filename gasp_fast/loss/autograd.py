"""The gradients of the operators, as autograd functions.

`FusedLoss` has the weight of every term in forward, so it computes the gradient in the same pass and backward only
scales it. `UnreducedTerms` returns the terms one by one; backward runs the pass again with the upstream gradients as
weights. `FrameMatching` is `frame_match` with its gradient.

None of them can be differentiated twice, because autograd does not record how backward computes its gradients.
`create_graph=True` raises an error; without this check second derivatives would silently be zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gasp_fast.kernels.index import MatchIndex, RowIndex

from . import operators
from .config import LossConfig


class FusedLoss(torch.autograd.Function):
    """(loss, corr, depth, best, confidence): the loss [] with its gradient, and the terms [L, M] without.

    `layer_weights` get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: LossConfig,
        reduction: str,
        index: MatchIndex,
        layer_weights: Tensor,  # [L]
        temperature: Tensor,  # []
        *embeddings: Tensor,  # one [L, N, D], or L of [N, D]
    ) -> tuple[Tensor, ...]:
        ctx.config, ctx.reduction, ctx.index, ctx.gradients_scaled = config, reduction, index, False
        loss, corr, depth, best, confidence, *gradients = FusedLoss._compute(
            ctx, layer_weights, temperature, *embeddings
        )
        ctx.save_for_backward(layer_weights, temperature, *embeddings, *gradients)
        ctx.mark_non_differentiable(corr, depth, best, confidence)
        return loss, corr, depth, best, confidence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access
        count = len(ctx.needs_input_grad) - 3
        inputs, gradients = saved[:count], saved[count:]
        if ctx.gradients_scaled:  # a second backward over a retained graph: the first one scaled them in place
            gradients = FusedLoss._compute(ctx, *inputs)[5:]
        ctx.gradients_scaled = True
        temperature_gradient, *embedding_gradients = gradients
        return _input_gradients(ctx, 4, temperature_gradient * upstream, _scaled(embedding_gradients, upstream))

    @staticmethod
    def _compute(ctx: Any, layer_weights: Tensor, temperature: Tensor, *embeddings: Tensor) -> list[Tensor]:
        config, (needs_temperature, *needs_embeddings) = ctx.config, ctx.needs_input_grad[4:]
        return operators.fused_loss(
            embeddings, ctx.index.tensors(), temperature, layer_weights, config.corr_weight, config.depth_weight,
            ctx.reduction, config.negatives, config.eps, any(needs_embeddings), needs_temperature, config.backend,
        )  # fmt: skip


class UnreducedTerms(torch.autograd.Function):
    """(corr, depth, best, confidence), [L, M]; the first two are differentiable.

    With `computed`, the (corr, depth) of an earlier pass, forward returns them and only backward computes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: LossConfig,
        computed: tuple[Tensor, Tensor] | None,
        index: MatchIndex,
        temperature: Tensor,  # []
        *embeddings: Tensor,
    ) -> tuple[Tensor, ...]:
        if computed is None:
            corr, depth, best, confidence, *_ = operators.unreduced_terms(
                embeddings, index.tensors(), temperature, None, None, config.negatives, config.eps, False, False,
                config.backend,
            )  # fmt: skip
        else:
            corr, depth = (term.clone() for term in computed)
            best, confidence = corr.new_empty(0, dtype=torch.int64), corr.new_empty(0)
        ctx.config, ctx.index = config, index
        ctx.save_for_backward(temperature, *embeddings)
        ctx.mark_non_differentiable(best, confidence)
        return corr, depth, best, confidence

    @staticmethod
    def backward(ctx: Any, corr_weights: Tensor, depth_weights: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        temperature, *embeddings = ctx.saved_tensors
        config, (needs_temperature, *needs_embeddings) = ctx.config, ctx.needs_input_grad[3:]
        _, _, _, _, temperature_gradient, *embedding_gradients = operators.unreduced_terms(
            embeddings, ctx.index.tensors(), temperature, corr_weights, depth_weights, config.negatives, config.eps,
            any(needs_embeddings), needs_temperature, config.backend,
        )  # fmt: skip
        return _input_gradients(ctx, 3, temperature_gradient, embedding_gradients)


class FrameMatching(torch.autograd.Function):
    """(lse [L, A, P], known_lse, expected [L, A, P, V], best, peak); lse and expected are differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: RowIndex,
        longest: int,
        values: Tensor | None,  # float32 [N, V]
        known: Tensor | None,  # bool [N]
        exclude_own: bool,
        backend: str,
        temperature: Tensor,  # []
        *embeddings: Tensor,
    ) -> tuple[Tensor, ...]:
        statistics = operators.frame_match(
            embeddings, rows.tensors(), longest, temperature, values, known, exclude_own, backend
        )
        lse, known_lse, expected, best, peak = statistics
        ctx.rows, ctx.values, ctx.known, ctx.exclude_own, ctx.backend = rows, values, known, exclude_own, backend
        ctx.save_for_backward(*statistics, temperature, *embeddings)
        ctx.mark_non_differentiable(known_lse, best, peak)
        return lse, known_lse, expected, best, peak

    @staticmethod
    def backward(ctx: Any, lse_gradient: Tensor, _: Any, expected_gradient: Tensor, *__: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        saved = ctx.saved_tensors
        statistics, (temperature, *embeddings) = saved[:5], saved[5:]
        needs_temperature, *needs_embeddings = ctx.needs_input_grad[6:]
        temperature_gradient, *embedding_gradients = operators.frame_match_gradient(
            embeddings, ctx.rows.tensors(), temperature, ctx.values, ctx.known, ctx.exclude_own, statistics,
            lse_gradient, expected_gradient, any(needs_embeddings), needs_temperature, ctx.backend,
        )  # fmt: skip
        return _input_gradients(ctx, 6, temperature_gradient, embedding_gradients)


def _input_gradients(
    ctx: Any, before: int, temperature_gradient: Tensor, embedding_gradients: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """One gradient per input: None for the first `before`, then the temperature's and those of the embeddings."""
    needs_temperature, *needs_embeddings = ctx.needs_input_grad[before:]
    wanted = [embedding_gradients[at] if want else None for at, want in enumerate(needs_embeddings)]
    return (*(None,) * before, temperature_gradient if needs_temperature else None, *wanted)


def _scaled(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """`upstream * gradients`, in place where nothing records it: the gradients are the largest tensors of all."""
    if torch.compiler.is_compiling():
        return [gradient * upstream.to(gradient.dtype) for gradient in gradients]
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradients
    for gradient in gradients:
        # `.data`: autograd would refuse the change of a saved tensor. A second backward computes it anew.
        gradient.data.mul_(upstream.to(gradient.dtype))
    return gradients


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gasp_fast: create_graph=True needs the gradient of a gradient, which the fused kernels do not have; "
            "use backend='torch' for that"
        )
