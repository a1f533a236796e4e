"""The engines as PyTorch operators, which `torch.compile` does not trace; fake functions give it the shapes.

| operator                          | computes                                                                    |
| --------------------------------- | --------------------------------------------------------------------------- |
| `gasp_fast::fused_loss`           | the weighted loss and its gradient, in one pass                             |
| `gasp_fast::unreduced_terms`      | the terms one by one; with weights, the gradient of their weighted sum      |
| `gasp_fast::frame_match`          | the statistics of each row over each frame                                  |
| `gasp_fast::frame_match_gradient` | the gradient of a weighted sum of these statistics                          |

Operators take tensors and plain numbers, so an index is passed as the list of its tensors and a `LossConfig` as its
fields. None is differentiable by itself: `autograd.py` defines their gradients. Every operation that rounds is inside,
so a compiler that folds or reorders arithmetic around the operators cannot change a gradient.

Embeddings come as a list: either one tensor [L, N, D] or L tensors [N, D]. Neither form is copied into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gasp_fast.kernels.chunk import FrameStatistics, FrameUpstream, MatchTerms, Problem, TermWeights
from gasp_fast.kernels.engines import ENGINES
from gasp_fast.kernels.index import MatchIndex, RowIndex

from .arguments import layer_count
from .reduction import term_weights


@torch.library.custom_op("gasp_fast::fused_loss", mutates_args=())
def fused_loss(
    embeddings: Sequence[Tensor],  # one [L, N, D], or L of [N, D]
    index: Sequence[Tensor],  # MatchIndex.tensors()
    temperature: Tensor,  # []
    layer_weights: Tensor,  # [L]
    corr_weight: float,
    depth_weight: float,
    reduction: str,  # "mean" | "sum"
    negatives: str,  # "sequence" | "frame"
    eps: float,
    needs_embedding_gradient: bool,
    needs_temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """[loss, corr, depth, best, confidence, dtemperature, *dembeddings]; the last with `needs_embedding_gradient`."""
    match_index = MatchIndex.from_tensors(list(index))
    weights = term_weights(match_index, layer_weights, corr_weight, depth_weight, reduction)  # [L, M]
    terms, gradients = _terms_and_gradients(
        embeddings, match_index, temperature,
        weights if needs_embedding_gradient or needs_temperature_gradient else None, negatives, eps,
        needs_embedding_gradient, needs_temperature_gradient, backend,
    )  # fmt: skip
    loss = (weights.corr * terms.corr + weights.depth * terms.depth).sum()
    return [loss, *terms, *gradients]


@fused_loss.register_fake
def _(
    embeddings: Sequence[Tensor], index: Sequence[Tensor], temperature: Tensor, layer_weights: Tensor,
    corr_weight: float, depth_weight: float, reduction: str, negatives: str, eps: float,
    needs_embedding_gradient: bool, *_: Any,
) -> list[Tensor]:  # fmt: skip
    loss = embeddings[0].new_empty((), dtype=torch.float32)
    return [loss, *_fake_terms(embeddings, index), *_fake_gradients(embeddings, temperature, needs_embedding_gradient)]


@torch.library.custom_op("gasp_fast::unreduced_terms", mutates_args=())
def unreduced_terms(
    embeddings: Sequence[Tensor],
    index: Sequence[Tensor],  # MatchIndex.tensors()
    temperature: Tensor,
    corr_weights: Tensor | None,  # float32 [L, M]; with both, gradients of `sum weight * term` are computed
    depth_weights: Tensor | None,  # float32 [L, M]
    negatives: str,
    eps: float,
    needs_embedding_gradient: bool,
    needs_temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """[corr, depth, best, confidence, dtemperature, *dembeddings]; the last with `needs_embedding_gradient`."""
    weights = None if corr_weights is None or depth_weights is None else TermWeights(corr_weights, depth_weights)
    terms, gradients = _terms_and_gradients(
        embeddings, MatchIndex.from_tensors(list(index)), temperature, weights, negatives, eps,
        needs_embedding_gradient, needs_temperature_gradient, backend,
    )  # fmt: skip
    return [*terms, *gradients]


@unreduced_terms.register_fake
def _(
    embeddings: Sequence[Tensor], index: Sequence[Tensor], temperature: Tensor, corr_weights: Tensor | None,
    depth_weights: Tensor | None, negatives: str, eps: float, needs_embedding_gradient: bool, *_: Any,
) -> list[Tensor]:  # fmt: skip
    return [*_fake_terms(embeddings, index), *_fake_gradients(embeddings, temperature, needs_embedding_gradient)]


@torch.library.custom_op("gasp_fast::frame_match", mutates_args=())
def frame_match(
    embeddings: Sequence[Tensor],
    rows: Sequence[Tensor],  # RowIndex.tensors()
    longest: int,  # P, the frames of the longest sequence
    temperature: Tensor,
    values: Tensor | None,  # float32 [N, V]
    known: Tensor | None,  # bool [N]
    exclude_own: bool,
    backend: str,
) -> list[Tensor]:
    """[lse, known_lse, expected, best, peak], each [L, A, P]."""
    row_index, tau = RowIndex.from_tensors(list(rows)), _kernel_temperature(temperature, embeddings)
    with _without_autocast(embeddings):
        parts = [
            ENGINES[backend](stack).frame_match(Problem(stack, row_index, tau, values, known, exclude_own))
            for _, stack in _stacks(embeddings)
        ]
    return [torch.cat(statistic) if len(statistic) > 1 else statistic[0] for statistic in zip(*parts, strict=True)]


@frame_match.register_fake
def _(
    embeddings: Sequence[Tensor], rows: Sequence[Tensor], longest: int, temperature: Tensor, values: Tensor | None,
    *_: Any,
) -> list[Tensor]:  # fmt: skip
    anchors, width = RowIndex.from_tensors(list(rows)).row_token.shape[0], 0 if values is None else values.shape[1]
    floats = embeddings[0].new_empty((layer_count(embeddings), anchors, longest), dtype=torch.float32)
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
    needs_embedding_gradient: bool,
    needs_temperature_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """[dtemperature, *dembeddings]; the last with `needs_embedding_gradient`."""
    row_index, tau = RowIndex.from_tensors(list(rows)), _kernel_temperature(temperature, embeddings)
    gradients = _Gradients(embeddings, needs_embedding_gradient)
    with _without_autocast(embeddings):
        for number, (layers, stack) in enumerate(_stacks(embeddings)):
            temperature_gradient = ENGINES[backend](stack).frame_match_gradient(
                Problem(stack, row_index, tau, values, known, exclude_own),
                FrameStatistics(*(value[layers] for value in statistics)),
                FrameUpstream(lse_gradient[layers], expected_gradient[layers]),
                gradients.of_stack(number, stack), needs_temperature_gradient,
            )  # fmt: skip
            gradients.add_temperature_gradient(temperature_gradient)
    return gradients.tensors(temperature)


@frame_match_gradient.register_fake
def _(
    embeddings: Sequence[Tensor], rows: Sequence[Tensor], temperature: Tensor, values: Tensor | None,
    known: Tensor | None, exclude_own: bool, statistics: Sequence[Tensor], lse_gradient: Tensor,
    expected_gradient: Tensor, needs_embedding_gradient: bool, *_: Any,
) -> list[Tensor]:  # fmt: skip
    return _fake_gradients(embeddings, temperature, needs_embedding_gradient)


def _terms_and_gradients(
    embeddings: Sequence[Tensor],
    index: MatchIndex,
    temperature: Tensor,
    weights: TermWeights | None,
    negatives: str,
    eps: float,
    needs_embedding_gradient: bool,
    needs_temperature_gradient: bool,
    backend: str,
) -> tuple[MatchTerms, list[Tensor]]:
    """Terms [L, M], and [dtemperature, *dembeddings]."""
    terms = MatchTerms.empty(layer_count(embeddings), index.order.shape[0], embeddings[0].device)
    gradients, tau = _Gradients(embeddings, needs_embedding_gradient), _kernel_temperature(temperature, embeddings)
    with _without_autocast(embeddings):
        for number, (layers, stack) in enumerate(_stacks(embeddings)):
            temperature_gradient = ENGINES[backend](stack).terms_and_gradients(
                Problem.of_loss(stack, index, tau), index, None if weights is None else weights.of_layers(layers),
                terms.of_layers(layers), negatives, eps, gradients.of_stack(number, stack), needs_temperature_gradient,
            )  # fmt: skip
            gradients.add_temperature_gradient(temperature_gradient)
    return terms, gradients.tensors(temperature)


class _Gradients:
    """Memory for the gradients of the embeddings, and the gradient of the temperature, summed over the stacks."""

    def __init__(self, embeddings: Sequence[Tensor], needs_embedding_gradient: bool) -> None:
        self.embeddings = [_contiguous_like(e) for e in embeddings] if needs_embedding_gradient else []
        self.temperature_gradient = torch.zeros((), dtype=torch.float32, device=embeddings[0].device)

    def of_stack(self, number: int, stack: Tensor) -> Tensor | None:
        return self.embeddings[number].view(stack.shape) if self.embeddings else None

    def add_temperature_gradient(self, temperature_gradient: Tensor | None) -> None:
        if temperature_gradient is not None:
            self.temperature_gradient = self.temperature_gradient + temperature_gradient

    def tensors(self, temperature: Tensor) -> list[Tensor]:
        return [self.temperature_gradient.to(temperature.device, temperature.dtype), *self.embeddings]


def _stacks(embeddings: Sequence[Tensor]) -> list[tuple[slice, Tensor]]:
    """Each tensor of the list as [G, N, D], with the layers that it holds."""
    if embeddings[0].dim() == 3:
        return [(slice(0, embeddings[0].shape[0]), embeddings[0])]
    return [(slice(layer, layer + 1), e[None]) for layer, e in enumerate(embeddings)]


def _kernel_temperature(temperature: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    return temperature.detach().to(device=embeddings[0].device, dtype=torch.float32, non_blocking=True)


def _without_autocast(embeddings: Sequence[Tensor]) -> torch.autocast:
    """Products inside an operator run in their own types, also under a caller's autocast."""
    return torch.autocast(embeddings[0].device.type, enabled=False)


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_terms(embeddings: Sequence[Tensor], index: Sequence[Tensor]) -> list[Tensor]:
    matches = MatchIndex.from_tensors(list(index)).order.shape[0]
    corr = embeddings[0].new_empty((layer_count(embeddings), matches), dtype=torch.float32)
    return [corr, torch.empty_like(corr), torch.empty_like(corr, dtype=torch.int64), torch.empty_like(corr)]


def _fake_gradients(embeddings: Sequence[Tensor], temperature: Tensor, needs_embedding_gradient: bool) -> list[Tensor]:
    return [
        torch.empty_like(temperature),
        *([_contiguous_like(e) for e in embeddings] if needs_embedding_gradient else []),
    ]
