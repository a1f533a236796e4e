"""`gasp_loss`: InfoNCE over point correspondences and soft-argmax depth, for all layers in one call.

Knows embeddings and `Matches`; no model, no trainer. The mathematics stands in `reference.py`, the strategies in
`kernels/`. Here the arguments are checked, a backend is chosen, and terms become a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gasp_fast.kernels.engines import choose_backend

from . import arguments as inputs
from . import autograd
from .autograd import Settings, Weighting
from .dense import dense_terms
from .matches import Matches

PCK_RADIUS = 2  # patches, on the token grid (paper, Sec. 5)


@dataclass(frozen=True)
class LayerMetrics:
    """How well each layer finds the targets, from the same pass as the loss. 0 where there is no match."""

    accuracy: Tensor  # [L], share of matches whose arg-max is the target token
    pck: Tensor | None  # [L], share within two patches of it; None without `Matches.token_xy`
    confidence: Tensor  # [L], mean probability of the arg-max within its frame


@dataclass(frozen=True)
class GaspOutput:
    loss: Tensor
    corr: Tensor
    depth: Tensor
    corr_per_layer: Tensor  # [L], detached
    depth_per_layer: Tensor  # [L], detached
    metrics: LayerMetrics | None
    backend: str  # which backend computed it


def gasp_loss(
    embeddings: Tensor | Sequence[Tensor],  # [L, N, D], [N, D], or L tensors [N, D]; raw, not normalised
    matches: Matches,
    temperature: float | Tensor = 0.07,  # a 0-dim tensor may require grad
    negatives: str = "sequence",  # "sequence" | "frame"
    corr_weight: float = 0.3,
    depth_weight: float = 1.0,
    eps: float = 1e-6,
    layer_weights: Tensor | None = None,  # [L]: the loss is the weighted sum over layers; None = 1 / L each
    reduction: str = "mean",  # "mean" | "sum" | "none"
    return_metrics: bool = False,
    backend: str = "auto",  # "auto" | "triton" | "cpp" | "torch"
) -> GaspOutput:
    """`corr_weight * corr + depth_weight * depth`, each averaged over its matches and then over layers.

    `reduction="sum"` sums over matches instead; `"none"` returns `loss`, `corr` and `depth` as [L, M] terms, a
    match without depth contributing 0, and `layer_weights` multiplying the terms of `loss`.
    """
    layers = inputs.checked_embeddings(embeddings)
    _check_arguments(layers, matches, negatives, corr_weight, depth_weight, eps, reduction)
    tau = inputs.checked_temperature(temperature, layers[0])
    weights = _checked_layer_weights(layer_weights, layers, reduction)
    chosen = choose_backend(backend, layers[0].device, layers[0].dtype)
    settings = Settings(negatives == "sequence", float(eps), chosen)
    corr_factor, depth_factor = _factors(matches, reduction)

    if chosen == "torch":
        corr, depth, best, confidence = dense_terms(
            inputs.stacked(layers), matches.plan, tau, settings.sequence_negatives, eps,
            matches.target_depth, matches.patch_depth,
        )  # fmt: skip
        loss = None
    elif reduction == "none":
        corr, depth, best, confidence = autograd.match_terms(layers, matches.plan.tensors(), tau, settings)
        loss = None
    else:
        if not torch.is_grad_enabled():  # autograd functions see what requires grad, not whether anyone records
            layers, tau = [layer.detach() for layer in layers], tau.detach()
        weighting = Weighting(float(corr_weight), float(depth_weight), mean=reduction == "mean")
        loss, corr, depth, best, confidence = autograd.fused_loss(
            layers, matches.plan.tensors(), tau, weights.detach(), weighting, settings
        )
    if loss is not None and torch.is_grad_enabled():
        # The loss carries its gradient already. Whoever differentiates `corr` or `depth` alone pays for it then.
        corr, depth, *_ = autograd.match_terms(layers, matches.plan.tensors(), tau, settings, (corr, depth))

    metrics = _metrics(matches, best, confidence) if return_metrics else None
    return _reduced(corr, depth, loss, weights, corr_weight, depth_weight, corr_factor, depth_factor, reduction,
                    metrics, chosen)  # fmt: skip


def _check_arguments(
    layers: list[Tensor],
    matches: Matches,
    negatives: str,
    corr_weight: float,
    depth_weight: float,
    eps: float,
    reduction: str,
) -> None:
    if not isinstance(matches, Matches):
        raise TypeError(f"matches is a {type(matches).__name__}; pass a gasp_fast.Matches")
    tokens = layers[0].shape[-2]
    if tokens != matches.tokens:
        raise ValueError(f"embeddings hold {tokens} tokens, matches.frame_offsets ends at {matches.tokens}")
    if matches.device != layers[0].device:
        raise ValueError(f"matches lie on {matches.device}, embeddings on {layers[0].device}; use matches.to(...)")
    inputs.check_choice("negatives", negatives, ("sequence", "frame"))
    inputs.check_choice("reduction", reduction, ("mean", "sum", "none"))
    inputs.check_number("corr_weight", corr_weight, positive=False)
    inputs.check_number("depth_weight", depth_weight, positive=False)
    inputs.check_number("eps", eps, positive=True)


def _checked_layer_weights(layer_weights: Tensor | None, layers: list[Tensor], reduction: str) -> Tensor:
    count, like = inputs.layer_count(layers), layers[0]
    if layer_weights is None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((count,), 1.0 if reduction == "none" else 1.0 / count, dtype=dtype, device=like.device)
    if not isinstance(layer_weights, Tensor) or not layer_weights.is_floating_point():
        raise TypeError("layer_weights must be a floating tensor with one weight per layer")
    if layer_weights.shape != (count,):
        raise ValueError(f"layer_weights has shape {list(layer_weights.shape)}; there are {count} layers")
    if layer_weights.device != like.device:
        raise ValueError(f"layer_weights lies on {layer_weights.device}, embeddings on {like.device}; move it there")
    return layer_weights


def _factors(matches: Matches, reduction: str) -> tuple[float, Tensor | float]:
    """What each term is multiplied with before it is summed over matches; under "none", for the per-layer means."""
    if reduction == "sum":
        return 1.0, 1.0
    return 1.0 / max(1, len(matches)), matches.plan.depth_count.reciprocal()


def _reduced(
    corr: Tensor,  # [L, M]
    depth: Tensor,  # [L, M]
    loss: Tensor | None,
    weights: Tensor,  # [L]
    corr_weight: float,
    depth_weight: float,
    corr_factor: float,
    depth_factor: Tensor | float,
    reduction: str,
    metrics: LayerMetrics | None,
    backend: str,
) -> GaspOutput:
    if reduction == "none":
        terms = weights[:, None].to(corr.dtype) * (corr_weight * corr + depth_weight * depth)
        corr_means, depth_means = (corr.detach() * corr_factor).sum(1), (depth.detach() * depth_factor).sum(1)
        return GaspOutput(terms, corr, depth, corr_means, depth_means, metrics, backend)
    corr_layers = (corr * corr_factor).sum(1)  # [L]
    depth_layers = (depth * depth_factor).sum(1)
    weights = weights.to(corr_layers.dtype)
    if loss is None:
        loss = (weights * (corr_weight * corr_layers + depth_weight * depth_layers)).sum()
    elif weights.requires_grad:  # the fused loss saw the weights as numbers: this adds 0 and their gradient
        per_layer = (corr_weight * corr_layers + depth_weight * depth_layers).detach()
        loss = loss + ((weights - weights.detach()) * per_layer).sum()
    return GaspOutput(
        loss,
        (weights * corr_layers).sum(),
        (weights * depth_layers).sum(),
        corr_layers.detach(),
        depth_layers.detach(),
        metrics,
        backend,
    )


def _metrics(matches: Matches, best: Tensor, confidence: Tensor) -> LayerMetrics:
    share = 1.0 / max(1, len(matches))
    hit = best == matches.target  # [L, M]
    pck = None
    if matches.token_xy is not None:
        offset = matches.token_xy[best.clamp(min=0)] - matches.token_xy[matches.target]  # [L, M, 2]
        pck = (offset.long().square().sum(-1) <= PCK_RADIUS**2).sum(1) * share
    return LayerMetrics(hit.sum(1) * share, pck, confidence.float().sum(1) * share)
