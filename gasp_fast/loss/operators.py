"""The engines as PyTorch operators: opaque to `torch.compile`, with fakes that know every shape.

`gasp_fast::fused_loss` is the weighted loss with its gradient in one pass; `gasp_fast::match_terms` the terms one by
one, with the gradient for given weights; `gasp_fast::frame_match` and its gradient are the primitive. None of them is
differentiable by itself: the functions of `gasp_fast.autograd` say what their gradients are.

Whatever rounds is inside: a compiler that folds or reorders arithmetic around the operators cannot change a gradient.

Embeddings come as a list: either one tensor [L, N, D] or L tensors [N, D]. Neither is ever copied into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gasp_fast.kernels.chunk import FrameStatistics, FrameUpstream, MatchScales, MatchTerms
from gasp_fast.kernels.engines import engine_for
from gasp_fast.kernels.plan import MatchPlan, RowPlan


@torch.library.custom_op("gasp_fast::fused_loss", mutates_args=())
def fused_loss(
    embeddings: Sequence[Tensor],  # one [L, N, D], or L of [N, D]
    plan: Sequence[Tensor],  # MatchPlan.tensors()
    temperature: Tensor,  # []
    layer_weights: Tensor,  # [L]
    corr_weight: float,
    depth_weight: float,
    mean: bool,  # over matches; else their sum
    sequence_negatives: bool,
    eps: float,
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """[loss, corr, depth, best, confidence, dtemperature, *dembeddings]; gradients only where asked for."""
    match_plan = MatchPlan.from_tensors(list(plan))
    layers, matches = _layers(embeddings), match_plan.order.shape[0]
    corr_factor: float = corr_weight
    depth_factor: float | Tensor = depth_weight
    if mean:
        corr_factor, depth_factor = corr_weight / max(1, matches), depth_weight / match_plan.depth_count
    weights = layer_weights.float()[:, None]
    scales = MatchScales(
        (weights * corr_factor).expand(layers, matches), (weights * depth_factor).expand(layers, matches)
    )
    gradient_scales = scales if embedding_gradient or temperature_gradient else None
    terms, gradients = _terms_and_gradients(
        embeddings, match_plan, temperature, gradient_scales, sequence_negatives, eps, embedding_gradient,
        temperature_gradient, backend,
    )  # fmt: skip
    loss = (scales.corr * terms.corr + scales.depth * terms.depth).sum()
    return [loss, *terms, *gradients]


@fused_loss.register_fake
def _(
    embeddings: Sequence[Tensor],
    plan: Sequence[Tensor],
    temperature: Tensor,
    layer_weights: Tensor,
    corr_weight: float,
    depth_weight: float,
    mean: bool,
    sequence_negatives: bool,
    eps: float,
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    loss = embeddings[0].new_empty((), dtype=torch.float32)
    return [loss, *_fake_terms(embeddings, plan), *_fake_gradients(embeddings, temperature, embedding_gradient)]


@torch.library.custom_op("gasp_fast::match_terms", mutates_args=())
def match_terms(
    embeddings: Sequence[Tensor],
    plan: Sequence[Tensor],
    temperature: Tensor,
    corr_scale: Tensor | None,  # float32 [L, M]; with scales, gradients of `sum scale * term` are computed
    depth_scale: Tensor | None,  # float32 [L, M]
    sequence_negatives: bool,
    eps: float,
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """[corr, depth, best, confidence, dtemperature, *dembeddings]; gradients only where asked for."""
    scales = None if corr_scale is None or depth_scale is None else MatchScales(corr_scale, depth_scale)
    terms, gradients = _terms_and_gradients(
        embeddings, MatchPlan.from_tensors(list(plan)), temperature, scales, sequence_negatives, eps,
        embedding_gradient, temperature_gradient, backend,
    )  # fmt: skip
    return [*terms, *gradients]


@match_terms.register_fake
def _(
    embeddings: Sequence[Tensor],
    plan: Sequence[Tensor],
    temperature: Tensor,
    corr_scale: Tensor | None,
    depth_scale: Tensor | None,
    sequence_negatives: bool,
    eps: float,
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    return [*_fake_terms(embeddings, plan), *_fake_gradients(embeddings, temperature, embedding_gradient)]


@torch.library.custom_op("gasp_fast::frame_match", mutates_args=())
def frame_match(
    embeddings: Sequence[Tensor],
    rows: Sequence[Tensor],  # RowPlan.tensors()
    longest: int,  # frames of the longest sequence
    temperature: Tensor,
    values: Tensor | None,  # float32 [N, V]
    known: Tensor | None,  # bool [N]
    exclude_own: bool,
    backend: str,
) -> list[Tensor]:
    """[lse, known_lse, expected, best, peak], each [L, A, P]."""
    plan, parts = RowPlan.from_tensors(list(rows)), []

    def statistics_of(entry: Tensor, layers: slice, tau: Tensor, gradient: Tensor | None) -> None:
        parts.append(engine_for(backend, entry).frame_match(entry, plan, tau, values, known, exclude_own))

    _each_entry(embeddings, temperature, False, statistics_of)
    return [torch.cat(statistic) if len(statistic) > 1 else statistic[0] for statistic in zip(*parts, strict=True)]


@frame_match.register_fake
def _(
    embeddings: Sequence[Tensor],
    rows: Sequence[Tensor],
    longest: int,
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
    backend: str,
) -> list[Tensor]:
    anchors, width = RowPlan.from_tensors(list(rows)).row_token.shape[0], 0 if values is None else values.shape[1]
    floats = embeddings[0].new_empty((_layers(embeddings), anchors, longest), dtype=torch.float32)
    return [
        floats,
        torch.empty_like(floats),
        floats.new_empty((*floats.shape, width)),
        torch.empty_like(floats, dtype=torch.int64),
        torch.empty_like(floats),
    ]


@torch.library.custom_op("gasp_fast::frame_match_gradient", mutates_args=())
def frame_match_gradient(
    embeddings: Sequence[Tensor],
    rows: Sequence[Tensor],
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
    statistics: Sequence[Tensor],  # what `frame_match` returned
    lse_gradient: Tensor,  # float32 [L, A, P]
    expected_gradient: Tensor,  # float32 [L, A, P, V]
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """[dtemperature, *dembeddings]."""
    plan = RowPlan.from_tensors(list(rows))

    def gradient_of(entry: Tensor, layers: slice, tau: Tensor, gradient: Tensor | None) -> Tensor | None:
        return engine_for(backend, entry).frame_match_gradient(
            entry,
            plan,
            tau,
            values,
            known,
            exclude_own,
            FrameStatistics(*(value[layers] for value in statistics)),
            FrameUpstream(lse_gradient[layers], expected_gradient[layers]),
            gradient,
            temperature_gradient,
        )

    return _each_entry(embeddings, temperature, embedding_gradient, gradient_of)


@frame_match_gradient.register_fake
def _(
    embeddings: Sequence[Tensor],
    rows: Sequence[Tensor],
    temperature: Tensor,
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
    statistics: Sequence[Tensor],
    lse_gradient: Tensor,
    expected_gradient: Tensor,
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    return _fake_gradients(embeddings, temperature, embedding_gradient)


def _terms_and_gradients(
    embeddings: Sequence[Tensor],
    plan: MatchPlan,
    temperature: Tensor,
    scales: MatchScales | None,
    sequence_negatives: bool,
    eps: float,
    embedding_gradient: bool,
    temperature_gradient: bool,
    backend: str,
) -> tuple[MatchTerms, list[Tensor]]:
    terms = MatchTerms.empty(_layers(embeddings), plan.order.shape[0], embeddings[0].device)

    def gradient_of(entry: Tensor, layers: slice, tau: Tensor, gradient: Tensor | None) -> Tensor | None:
        return engine_for(backend, entry).match_terms(
            entry,
            plan,
            tau,
            None if scales is None else MatchScales(*(scale[layers] for scale in scales)),
            terms.of_layers(layers),
            sequence_negatives,
            eps,
            gradient,
            temperature_gradient,
        )

    return terms, _each_entry(embeddings, temperature, embedding_gradient, gradient_of)


def _each_entry(
    embeddings: Sequence[Tensor],
    temperature: Tensor,
    embedding_gradient: bool,
    work: Callable[[Tensor, slice, Tensor, Tensor | None], Tensor | None],
) -> list[Tensor]:
    """Call `work(entry, layers, temperature, gradient to fill in)` for each; [dtemperature, *dembeddings]."""
    device = embeddings[0].device
    gradients = [_contiguous_like(e) for e in embeddings] if embedding_gradient else []
    tau = temperature.detach().to(device=device, dtype=torch.float32, non_blocking=True)
    slope = torch.zeros((), dtype=torch.float32, device=device)
    # Inside an operator nothing is cast on the way, whatever the caller's autocast says.
    with torch.autocast(device.type, enabled=False):
        for at, (layer, entry) in enumerate(_entries(embeddings)):
            gradient = gradients[at].view(entry.shape) if gradients else None
            part = work(entry, slice(layer, layer + entry.shape[0]), tau, gradient)
            slope = slope if part is None else slope + part
    return [slope.to(temperature.device, temperature.dtype), *gradients]


def _fake_terms(embeddings: Sequence[Tensor], plan: Sequence[Tensor]) -> list[Tensor]:
    matches = MatchPlan.from_tensors(list(plan)).order.shape[0]
    corr = embeddings[0].new_empty((_layers(embeddings), matches), dtype=torch.float32)
    return [corr, torch.empty_like(corr), torch.empty_like(corr, dtype=torch.int64), torch.empty_like(corr)]


def _fake_gradients(embeddings: Sequence[Tensor], temperature: Tensor, embedding_gradient: bool) -> list[Tensor]:
    return [torch.empty_like(temperature), *([_contiguous_like(e) for e in embeddings] if embedding_gradient else [])]


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _entries(embeddings: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """(first layer, [G, N, D]) of each tensor of the list."""
    if embeddings[0].dim() == 3:
        return [(0, embeddings[0])]
    return [(layer, e[None]) for layer, e in enumerate(embeddings)]


def _layers(embeddings: Sequence[Tensor]) -> int:
    return embeddings[0].shape[0] if embeddings[0].dim() == 3 else len(embeddings)
