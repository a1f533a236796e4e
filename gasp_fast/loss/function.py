"""`gasp_loss`: InfoNCE over point correspondences and soft-argmax depth, for all layers in one call.

`naive.py` defines the mathematics; the kernels compute it. Here the arguments are checked, a backend is chosen, and
the terms of matches become a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gasp_fast.kernels.chunk import TermDefinition
from gasp_fast.kernels.engines import choose_backend

from .arguments import (
    check_choice,
    check_number,
    check_workspace,
    checked_embeddings,
    checked_keys,
    checked_layer_weights,
    checked_temperature,
    layer_stack,
    traced,
)
from .autograd import FusedLoss, UnreducedTerms, refuse_transforms
from .config import LossConfig
from .dense import dense_terms
from .matches import Matches
from .metric import InMetric
from .reduction import MatchShares, MeansOfMatches, layer_losses

PCK_RADIUS = 2  # patches, on the token grid (paper, Sec. 5)


@dataclass(frozen=True)
class LayerMetrics:
    """How well each layer finds the targets, from the same pass as the loss. 0 where there is no match."""

    accuracy: Tensor  # [L], share of matches whose arg-max is the target token
    pck: Tensor | None  # [L], share within two patches of it; None without `Matches.token_xy`
    confidence: Tensor  # [L], mean probability of the arg-max within its frame


@dataclass(frozen=True)
class GaspOutput:
    loss: Tensor  # []; [L, M] under reduction="none"
    corr: Tensor  # shape of `loss`
    depth: Tensor  # shape of `loss`
    corr_per_layer: Tensor  # [L], detached
    depth_per_layer: Tensor  # [L], detached
    metrics: LayerMetrics | None
    backend: str  # the one that computed it


def gasp_loss(
    embeddings: Tensor | Sequence[Tensor] | InMetric,  # [L, N, D], [N, D], or L tensors [N, D]; raw, not normalised
    matches: Matches,
    keys: Tensor | Sequence[Tensor] | None = None,  # like embeddings: the candidates; None = the embeddings
    temperature: float | Tensor = LossConfig.temperature,  # a 0-dim tensor may require grad
    negatives: str = "sequence",  # "sequence" | "frame"
    other_targets: str = "negatives",  # "negatives" | "ignored": an anchor's further targets, in a match's denominator
    corr_weight: float = LossConfig.corr_weight,
    depth_weight: float = LossConfig.depth_weight,
    eps: float = LossConfig.eps,
    layer_weights: Tensor | None = None,  # [L]: the loss is the weighted sum over layers; None = 1 / L each
    reduction: str = "mean",  # "mean" | "sum" | "none"
    return_metrics: bool = False,
    backend: str = "auto",  # "auto" | "triton" | "cpp" | "torch"
    workspace: int | None = None,  # MiB of scratch memory; None = 256 on GPUs of 40 GB and more, 128 below, 24 on a CPU
) -> GaspOutput:
    """`corr_weight * corr + depth_weight * depth`, each averaged over its matches and then over layers.

    `reduction="sum"` sums over matches instead; `"none"` returns `loss`, `corr` and `depth` as [L, M] terms. There, a
    match without depth has a depth term of 0, and `layer_weights` multiply the terms of `loss`. With `keys`, anchors
    are rows of `embeddings` and their candidates rows of `keys`: a loss on the queries and keys of attention.
    Embeddings that stand for longer vectors are passed as `in_metric(embeddings, metric)`.
    """
    metric: InMetric | None = None
    if isinstance(embeddings, InMetric):
        metric, layers = embeddings, embeddings.embeddings
    else:
        layers = checked_embeddings(embeddings)
    key_layers = checked_keys(keys, layers)
    if metric and key_layers:
        raise ValueError(
            "embeddings is in a metric, and keys is given; there, candidates are the embeddings themselves"
        )
    _check_arguments(layers, matches, negatives, corr_weight, depth_weight, eps, reduction)
    check_choice("other_targets", other_targets, ("negatives", "ignored"))
    check_workspace(workspace)
    tau = checked_temperature(temperature, layers[0])
    layer_weights = checked_layer_weights(layer_weights, layers, default=1.0 if reduction == "none" else None)
    # `config.temperature` is not used from here on: `tau` may be a tensor that is trained.
    config = LossConfig(
        corr_weight=float(corr_weight),
        depth_weight=float(depth_weight),
        negatives=negatives,  # type: ignore[arg-type]  # checked above
        other_targets=other_targets,  # type: ignore[arg-type]
        eps=float(eps),
        workspace=workspace,
        backend=choose_backend(backend, layers[0].device, layers[0].dtype),  # type: ignore[arg-type]
    )

    if config.backend != "torch":
        refuse_transforms(config.backend)

    loss = None
    if config.backend == "torch":
        stack = layer_stack(layers)
        corr, depth, best, confidence = dense_terms(
            stack, layer_stack(key_layers) if key_layers else stack, matches.index, tau,
            TermDefinition(config.negatives, config.other_targets, config.eps),
            matches.target_depth, matches.patch_depth, layer_stack(metric.metrics) if metric else None,
        )  # fmt: skip
    else:
        beside = "duals" if metric else "keys" if key_layers else ""
        tensors = [*metric.coordinates, *metric.duals] if metric else [*layers, *key_layers]
        if not torch.is_grad_enabled():  # autograd functions see what requires grad, not whether gradients are recorded
            tensors, tau = _detached(tensors), tau.detach()
        inputs = matches.index, beside, tau, *tensors
        if reduction == "none":
            corr, depth, best, confidence = UnreducedTerms.apply(config, None, *inputs)
        else:
            loss, corr, depth, best, confidence = FusedLoss.apply(
                config, reduction, matches.index, layer_weights.detach(), beside, tau, *tensors
            )
            if torch.is_grad_enabled():
                # The loss has its gradient already. That of `corr` or `depth` is computed only if a caller needs it.
                corr, depth, *_ = UnreducedTerms.apply(config, (corr, depth), *inputs)

    wanted = Wanted(reduction, layer_weights, return_metrics)
    return _output(config, matches, wanted, loss, corr, depth, best, confidence)


@dataclass(frozen=True)
class Wanted:
    """How a caller wants the terms of matches."""

    reduction: str
    layer_weights: Tensor  # [L]
    metrics: bool


def _output(
    config: LossConfig,
    matches: Matches,
    wanted: Wanted,
    loss: Tensor | None,  # []; None: not computed yet
    corr: Tensor,  # [L, M], like the next three
    depth: Tensor,
    best: Tensor,
    confidence: Tensor,
) -> GaspOutput:
    """The terms of matches, reduced."""
    reduction = wanted.reduction
    metrics: LayerMetrics | None
    if config.backend == "triton" and reduction != "sum" and not traced():
        corr_layers, depth_layers, metrics = _means_in_one_pass(matches, corr, depth, best, confidence)
    else:
        metrics = _metrics(matches, best, confidence) if wanted.metrics else None
        shares = MatchShares.of(matches.index, reduction, corr.dtype)
        corr_layers, depth_layers = layer_losses(corr, depth, shares)  # [L]
    metrics = metrics if wanted.metrics else None
    layer_weights = wanted.layer_weights.to(corr.dtype)
    if reduction == "none":
        loss = layer_weights[:, None] * (config.corr_weight * corr + config.depth_weight * depth)
        return GaspOutput(loss, corr, depth, corr_layers.detach(), depth_layers.detach(), metrics, config.backend)
    if loss is None or layer_weights.requires_grad:
        layer_loss = config.corr_weight * corr_layers + config.depth_weight * depth_layers
        if loss is None:
            loss = (layer_weights * layer_loss).sum()
        else:  # the fused loss has no gradient for them: this adds 0 and their gradient
            loss = loss + ((layer_weights - layer_weights.detach()) * layer_loss.detach()).sum()
    return GaspOutput(
        loss=loss,
        corr=(layer_weights * corr_layers).sum(),
        depth=(layer_weights * depth_layers).sum(),
        corr_per_layer=corr_layers.detach(),
        depth_per_layer=depth_layers.detach(),
        metrics=metrics,
        backend=config.backend,
    )


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
    check_choice("negatives", negatives, ("sequence", "frame"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_number("corr_weight", corr_weight, positive=False)
    check_number("depth_weight", depth_weight, positive=False)
    check_number("eps", eps, positive=True)


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _means_in_one_pass(
    matches: Matches, corr: Tensor, depth: Tensor, best: Tensor, confidence: Tensor
) -> tuple[Tensor, Tensor, LayerMetrics]:
    """The mean terms [L] of each layer, and its metrics."""
    places = None
    if matches.token_xy is not None and matches.target_xy is not None:
        places = matches.token_xy.contiguous(), matches.target_xy
    means = MeansOfMatches.apply(
        corr, depth, best, confidence, matches.index, matches.target, places, PCK_RADIUS
    )  # [L, 5]
    corr_layers, depth_layers, accuracy, pck, confidences = means.unbind(1)
    metrics = LayerMetrics(accuracy.detach(), None if places is None else pck.detach(), confidences.detach())
    return corr_layers, depth_layers, metrics


def _metrics(matches: Matches, best: Tensor, confidence: Tensor) -> LayerMetrics:
    share = MatchShares.of(matches.index, "mean", torch.float32).corr  # [M], or [1]
    hit = best == matches.target  # [L, M]
    pck = None
    if matches.token_xy is not None and matches.target_xy is not None:
        offset = matches.token_xy[best.clamp(min=0)] - matches.target_xy  # [L, M, 2]
        pck = ((offset.long().square().sum(-1) <= PCK_RADIUS**2) * share).sum(1)
    return LayerMetrics((hit * share).sum(1), pck, (confidence.float() * share).sum(1))
