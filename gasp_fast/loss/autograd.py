"""The gradients of the operators, as autograd functions.

`FusedLoss` has the weight of every term in forward, so it computes the gradient in the same pass and backward only
scales it. `UnreducedTerms` returns the terms one by one; backward runs the pass again with the upstream gradients as
weights. `FrameMatching` is `frame_match` with its gradient.

Each takes its embeddings and then, if there are any, its keys or its duals (`metric.py`), in one list of `tensors`.

None of them can be differentiated twice, because autograd does not record how backward computes its gradients.
`create_graph=True` raises an error; without this check second derivatives would silently be zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gasp_fast.kernels.index import MatchIndex, RowIndex
from gasp_fast.kernels.scaling import scale_in_place

from . import operators
from .arguments import traced
from .config import LossConfig

Beside = Literal["", "keys", "duals"]


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
        beside: Beside,
        temperature: Tensor,  # []
        *tensors: Tensor,  # one [L, N, D], or L of [N, D]; as many of what is `beside` them
    ) -> tuple[Tensor, ...]:
        ctx.config, ctx.reduction, ctx.index, ctx.beside, ctx.scaled = config, reduction, index, beside, False
        loss, corr, depth, best, confidence, *gradients = FusedLoss._compute(ctx, layer_weights, temperature, *tensors)
        ctx.save_for_backward(layer_weights, temperature, *tensors, *gradients)
        ctx.mark_non_differentiable(corr, depth, best, confidence)
        return loss, corr, depth, best, confidence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access
        count = len(ctx.needs_input_grad) - 4
        inputs, gradients = saved[:count], saved[count:]
        if ctx.scaled:  # a second backward over a retained graph: the first one scaled the gradients in place
            gradients = FusedLoss._compute(ctx, *inputs)[5:]
        ctx.scaled = True
        scale, temperature_gradient, *others = gradients
        if ctx.needs_input_grad[5]:
            temperature_gradient = temperature_gradient * upstream
        return _input_gradients(ctx, 5, [temperature_gradient, *_scaled(others, upstream, scale)])

    @staticmethod
    def _compute(ctx: Any, layer_weights: Tensor, temperature: Tensor, *tensors: Tensor) -> list[Tensor]:
        config, needs = ctx.config, _needs(ctx, 5)
        stacks = _stacks(tensors, ctx.beside)
        if not traced():
            return operators.loss_and_gradients(
                stacks, ctx.index, temperature, layer_weights, needs, ctx.reduction, config
            )
        return operators.fused_loss(
            *stacks.lists(), ctx.index.tensors(), temperature, layer_weights, needs, config.corr_weight,
            config.depth_weight, ctx.reduction, config.negatives, config.other_targets, config.eps, config.backend,
            config.workspace,
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
        beside: Beside,
        temperature: Tensor,  # []
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.config, ctx.index, ctx.beside = config, index, beside
        if computed is None:
            corr, depth, best, confidence, _ = UnreducedTerms._compute(
                ctx, (None, None), [False] * 3, temperature, tensors
            )
        else:
            corr, depth = (term.detach() for term in computed)
            best, confidence = corr.new_empty(0, dtype=torch.int64), corr.new_empty(0)
        ctx.save_for_backward(temperature, *tensors)
        ctx.mark_non_differentiable(best, confidence)
        return corr, depth, best, confidence

    @staticmethod
    def backward(ctx: Any, corr_weights: Tensor, depth_weights: Tensor, *_: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        temperature, *tensors = ctx.saved_tensors
        weights = corr_weights, depth_weights
        return _input_gradients(ctx, 4, UnreducedTerms._compute(ctx, weights, _needs(ctx, 4), temperature, tensors)[4:])

    @staticmethod
    def _compute(
        ctx: Any,
        weights: tuple[Tensor | None, Tensor | None],
        needs: list[bool],
        temperature: Tensor,
        tensors: Sequence[Tensor],
    ) -> list[Tensor]:
        config, stacks = ctx.config, _stacks(tensors, ctx.beside)
        if not traced():
            return operators.terms_and_gradients(stacks, ctx.index, temperature, *weights, needs, config)
        return operators.unreduced_terms(
            *stacks.lists(), ctx.index.tensors(), temperature, *weights, needs, config.negatives,
            config.other_targets, config.eps, config.backend, config.workspace,
        )  # fmt: skip


class FrameMatching(torch.autograd.Function):
    """(lse [L, A, P], known_lse, expected [L, A, P, V], best, peak); lse and expected are differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: RowIndex,
        longest: int,
        values: Tensor | None,  # float32 [N, V]
        known: Tensor | None,  # float32 [N]
        exclude_own: bool,
        backend: str,
        workspace: int | None,
        beside: Beside,
        temperature: Tensor,  # []
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        statistics = operators.frame_match(
            *_split(tensors, beside), rows.tensors(), longest, temperature, values, known, exclude_own, backend,
            workspace,
        )  # fmt: skip
        lse, known_lse, expected, best, peak = statistics
        ctx.rows, ctx.values, ctx.known, ctx.exclude_own = rows, values, known, exclude_own
        ctx.backend, ctx.workspace, ctx.beside = backend, workspace, beside
        ctx.save_for_backward(*statistics, temperature, *tensors)
        ctx.mark_non_differentiable(known_lse, best, peak)
        return lse, known_lse, expected, best, peak

    @staticmethod
    def backward(ctx: Any, lse_gradient: Tensor, _: Any, expected_gradient: Tensor, *__: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        saved = ctx.saved_tensors
        statistics, (temperature, *tensors) = saved[:5], saved[5:]
        gradients = operators.frame_match_gradient(
            *_split(tensors, ctx.beside), ctx.rows.tensors(), temperature, _needs(ctx, 8), ctx.values, ctx.known,
            ctx.exclude_own, statistics, lse_gradient, expected_gradient, ctx.backend, ctx.workspace,
        )  # fmt: skip
        return _input_gradients(ctx, 8, gradients)


def _split(tensors: Sequence[Any], beside: Beside) -> tuple[list[Any], list[Any]]:
    """Embeddings, and what is beside them."""
    count = len(tensors) // 2 if beside else len(tensors)
    return list(tensors[:count]), list(tensors[count:])


def _stacks(tensors: Sequence[Tensor], beside: Beside) -> operators.Stacks:
    embeddings, others = _split(tensors, beside)
    return operators.Stacks(embeddings, **({beside: others} if beside else {}))


def _needs(ctx: Any, before: int) -> list[bool]:
    """Whether the temperature, any embedding, any key needs its gradient."""
    temperature, *tensors = ctx.needs_input_grad[before:]
    embeddings, keys = _split(tensors, ctx.beside)
    return [temperature, any(embeddings), any(keys)]


def _input_gradients(ctx: Any, before: int, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient per input: None for the first `before`, then the temperature's, the embeddings', the keys'."""
    needs_temperature, *needs = ctx.needs_input_grad[before:]
    temperature_gradient, *others = gradients
    computed = iter(others)
    tensors: list[Tensor | None] = []
    for side in _split(needs, ctx.beside):  # all gradients of a side are computed where one is needed
        tensors += [(next(computed) if any(side) else None) for _ in side]
    wanted = [gradient if need else None for gradient, need in zip(tensors, needs, strict=True)]
    return (*(None,) * before, temperature_gradient if needs_temperature else None, *wanted)


def _scaled(gradients: list[Tensor], upstream: Tensor, scale: Tensor) -> list[Tensor]:
    """`gradients * upstream / scale[layer]`, in place where nothing records it: they are the largest tensors of all."""
    with_scale = len(gradients) > 0 and gradients[0].dtype == torch.float16  # elsewhere the scale is 1
    results = []
    for number, gradient in enumerate(gradients):
        factor = upstream.float().reshape(1)
        if with_scale:  # of all layers in a stack, or of one in a list
            layers = scale if gradient.dim() == 3 else scale[number % scale.shape[0]].reshape(1)
            factor = factor / layers
        if torch.compiler.is_compiling():
            factor = factor.view(-1, *[1] * (gradient.dim() - 1))
            results.append((gradient * factor).to(gradient.dtype))
        else:
            # `.data`: autograd would refuse the change of a saved tensor. A second backward computes it anew.
            scale_in_place(gradient.data, factor)
            results.append(gradient)
    return results


def refuse_transforms(backend: str) -> None:
    """Raises under `torch.func` (vmap, grad, jvp ...), whose transforms the autograd functions do not have."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"backend = {backend!r} does not work under torch.func (vmap, grad, jvp ...); use backend='torch', or "
            "torch.autograd.grad in place of torch.func.grad"
        )


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gasp_fast: create_graph=True needs the gradient of a gradient, which the fused kernels do not have; "
            "use backend='torch' for that"
        )
