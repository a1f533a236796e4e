"""What the operators of `kernels.ops` mean to autograd.

Three functions. `fused_loss` knows the weight of every term when it runs forward, so it computes the gradient in the
same pass and backward only scales it. `match_terms` returns the terms one by one; whatever gradient comes back for
them, backward runs the pass again with that as the weights. `frame_match` is the primitive, with its gradient.

None of them can be differentiated twice: what backward returns was computed, not recorded. Asking for it
(`create_graph=True`) is refused instead of being answered with zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators as ops


class Settings(NamedTuple):
    """How terms are computed; the same for every match."""

    sequence_negatives: bool
    eps: float
    backend: str


class Weighting(NamedTuple):
    """How terms become a loss, but for the weights of the layers."""

    corr_weight: float
    depth_weight: float
    mean: bool  # over matches; else their sum


def fused_loss(
    embeddings: list[Tensor],
    plan: list[Tensor],
    temperature: Tensor,
    layer_weights: Tensor,  # [L], taken as numbers: no gradient comes back for them
    weighting: Weighting,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and corr, depth, best, confidence [L, M] without gradient."""
    return _FusedLoss.apply(weighting, settings, len(plan), *plan, layer_weights, temperature, *embeddings)


def match_terms(
    embeddings: list[Tensor],
    plan: list[Tensor],
    temperature: Tensor,
    settings: Settings,
    known_terms: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """corr, depth, best, confidence [L, M]; the first two can be differentiated.

    With `known_terms` (corr and depth, computed before) forward costs nothing and only backward works.
    """
    return _MatchTerms.apply(settings, known_terms, len(plan), *plan, temperature, *embeddings)


def frame_match(
    embeddings: list[Tensor],
    rows: list[Tensor],
    longest: int,
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse [L, A, P], expected [L, A, P, V], best, peak; the first two can be differentiated."""
    lse, _, expected, best, peak = _FrameMatch.apply(
        (longest, exclude_own, backend), values, known, len(rows), *rows, temperature, *embeddings
    )
    return lse, expected, best, peak


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weighting: Weighting, settings: Settings, plan_size: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.weighting, ctx.settings, ctx.plan_size, ctx.spent = weighting, settings, plan_size, False
        loss, corr, depth, best, confidence, *gradients = _FusedLoss._run(ctx, tensors)
        ctx.save_for_backward(*tensors, *gradients)
        ctx.mark_non_differentiable(corr, depth, best, confidence)
        return loss, corr, depth, best, confidence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        count = len(ctx.needs_input_grad) - 3
        saved = ctx.saved_tensors  # once: checkpointing recomputes them at every look
        tensors, gradients = saved[:count], saved[count:]
        if ctx.spent:  # a second backward over a retained graph: the first one used the gradients up
            gradients = _FusedLoss._run(ctx, tensors)[5:]
        ctx.spent = True
        slope, *gradients = gradients
        return _given(ctx, 4 + ctx.plan_size, slope * upstream, _scaled(gradients, upstream))

    @staticmethod
    def _run(ctx: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        plan, (layer_weights, temperature, *embeddings) = tensors[: ctx.plan_size], tensors[ctx.plan_size :]
        wants_temperature, *wants = ctx.needs_input_grad[4 + ctx.plan_size :]
        negatives, eps, backend = ctx.settings
        return ops.fused_loss(
            embeddings, list(plan), temperature, layer_weights, *ctx.weighting, negatives, eps, any(wants),
            wants_temperature, backend,
        )  # fmt: skip


class _MatchTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, known_terms: tuple[Tensor, Tensor] | None, plan_size: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        plan, (temperature, *embeddings) = list(tensors[:plan_size]), tensors[plan_size:]
        if known_terms is None:
            corr, depth, best, confidence, *_ = ops.match_terms(
                embeddings, plan, temperature, None, None, *settings[:2], False, False, settings.backend
            )
        else:
            corr, depth = (term.clone() for term in known_terms)
            best, confidence = corr.new_empty(0, dtype=torch.int64), corr.new_empty(0)
        ctx.settings, ctx.plan_size = settings, plan_size
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(best, confidence)
        return corr, depth, best, confidence

    @staticmethod
    def backward(ctx: Any, corr_scale: Tensor, depth_scale: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        saved = ctx.saved_tensors
        plan, (temperature, *embeddings) = saved[: ctx.plan_size], saved[ctx.plan_size :]
        wants_temperature, *wants = ctx.needs_input_grad[3 + ctx.plan_size :]
        _, _, _, _, slope, *gradients = ops.match_terms(
            embeddings, list(plan), temperature, corr_scale, depth_scale, *ctx.settings[:2], any(wants),
            wants_temperature, ctx.settings.backend,
        )  # fmt: skip
        return _given(ctx, 3 + ctx.plan_size, slope, gradients)


class _FrameMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[int, bool, str],
        values: Tensor | None,
        known: Tensor | None,
        row_size: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        longest, exclude_own, backend = settings
        rows, (temperature, *embeddings) = list(tensors[:row_size]), tensors[row_size:]
        statistics = ops.frame_match(embeddings, rows, longest, temperature, values, known, exclude_own, backend)
        lse, known_lse, expected, best, peak = statistics
        ctx.settings, ctx.row_size = settings, row_size
        ctx.save_for_backward(values, known, *statistics, *tensors)
        ctx.mark_non_differentiable(known_lse, best, peak)
        return lse, known_lse, expected, best, peak

    @staticmethod
    def backward(ctx: Any, lse_gradient: Tensor, _: Any, expected_gradient: Tensor, *__: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        values, known, *rest = ctx.saved_tensors
        statistics, tensors = rest[:5], rest[5:]
        rows, (temperature, *embeddings) = tensors[: ctx.row_size], tensors[ctx.row_size :]
        _, exclude_own, backend = ctx.settings
        wants_temperature, *wants = ctx.needs_input_grad[4 + ctx.row_size :]
        slope, *gradients = ops.frame_match_gradient(
            embeddings, rows, temperature, values, known, exclude_own, statistics, lse_gradient, expected_gradient,
            any(wants), wants_temperature, backend,
        )  # fmt: skip
        return _given(ctx, 4 + ctx.row_size, slope, gradients)


def _given(ctx: Any, before: int, slope: Tensor, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient per input: nothing for the first `before`, then the temperature's and the embeddings'."""
    wants_temperature, *wants = ctx.needs_input_grad[before:]
    kept = [gradients[at] if want else None for at, want in enumerate(wants)]
    return (*(None,) * before, slope if wants_temperature else None, *kept)


def _scaled(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """`upstream * gradients`, in place where nobody records: the gradients are the largest thing there is."""
    if torch.compiler.is_compiling():
        return [gradient * upstream.to(gradient.dtype) for gradient in gradients]
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradients
    for gradient in gradients:
        # `.data`: autograd would count this as a change to a saved tensor. Whoever comes back for it recomputes.
        gradient.data.mul_(upstream.to(gradient.dtype))
    return gradients


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gasp_fast: create_graph=True asks for the gradient of a gradient, which the fused kernels do not have; "
            "use backend='torch' for that"
        )
