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

Where nothing traces the program, `loss_and_gradients` and `terms_and_gradients` are called directly. An operator of
Python costs the host 50 microseconds, and makes a new index, which has to read its numbers again.

Embeddings come as a list: either one tensor [L, N, D] or L tensors [N, D]. Neither form is copied into the other. Keys
come in the same form; an empty list means that the embeddings are the keys. So do duals (`metric.py`). `workspace` is
in MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gasp_fast.kernels.chunk import (
    FrameStatistics,
    FrameUpstream,
    MatchTerms,
    Problem,
    TermDefinition,
    TermWeights,
)
from gasp_fast.kernels.chunked import Gradients
from gasp_fast.kernels.engines import ENGINES
from gasp_fast.kernels.index import MatchIndex, RowIndex

from .arguments import layer_count
from .config import LossConfig
from .reduction import term_weights


@torch.library.custom_op("gasp_fast::fused_loss", mutates_args=())
def fused_loss(
    embeddings: Sequence[Tensor],
    keys: Sequence[Tensor],
    duals: Sequence[Tensor],
    index: Sequence[Tensor],  # MatchIndex.tensors()
    temperature: Tensor,  # []
    layer_weights: Tensor,  # [L]
    needs: Sequence[bool],  # gradients of the temperature, the embeddings, the keys
    corr_weight: float,
    depth_weight: float,
    reduction: str,  # "mean" | "sum"
    negatives: str,  # "sequence" | "frame"
    other_targets: str,  # "negatives" | "ignored"
    eps: float,
    backend: str,
    workspace: int | None,
) -> list[Tensor]:
    """[loss, corr, depth, best, confidence, scale, dtemperature, *dembeddings, *dkeys]; gradients as far as needed.

    The gradient of the temperature is empty where it is not needed.
    Gradients of layer l are multiplied by `scale[l]`, which float16 needs; `scale` is empty for other types.
    """
    config: Any = {"negatives": negatives, "other_targets": other_targets, "backend": backend}
    return loss_and_gradients(
        Stacks(list(embeddings), list(keys), list(duals)), MatchIndex.from_tensors(list(index)), temperature,
        layer_weights, needs, reduction,
        LossConfig(corr_weight=corr_weight, depth_weight=depth_weight, eps=eps, workspace=workspace, **config),
    )  # fmt: skip


def loss_and_gradients(
    stacks: Stacks,
    index: MatchIndex,
    temperature: Tensor,
    layer_weights: Tensor,
    needs: Sequence[bool],
    reduction: str,
    config: LossConfig,
) -> list[Tensor]:
    """What `fused_loss` returns."""
    weights = term_weights(index, layer_weights, config.corr_weight, config.depth_weight, reduction)  # [L, M]
    scale = _new_scale(layer_weights, stacks.embeddings)
    terms, gradients = _terms_and_gradients(
        stacks, index, temperature, weights if any(needs) else None, needs, config, scale
    )
    loss = (weights.corr * terms.corr + weights.depth * terms.depth).sum()
    return [loss, *terms, scale, *gradients]


@fused_loss.register_fake
def _(
    embeddings: Sequence[Tensor], keys: Sequence[Tensor], duals: Sequence[Tensor], index: Sequence[Tensor],
    temperature: Tensor,
    layer_weights: Tensor, needs: Sequence[bool], *_: Any,
) -> list[Tensor]:  # fmt: skip
    loss = embeddings[0].new_empty((), dtype=torch.float32)
    scale = _new_scale(layer_weights, embeddings)
    return [loss, *_fake_terms(embeddings, index), scale, *_fake_gradients(embeddings, keys, temperature, needs)]


@torch.library.custom_op("gasp_fast::unreduced_terms", mutates_args=())
def unreduced_terms(
    embeddings: Sequence[Tensor],
    keys: Sequence[Tensor],
    duals: Sequence[Tensor],
    index: Sequence[Tensor],  # MatchIndex.tensors()
    temperature: Tensor,
    corr_weights: Tensor | None,  # float32 [L, M]; with both, gradients of `sum weight * term` are computed
    depth_weights: Tensor | None,  # float32 [L, M]
    needs: Sequence[bool],
    negatives: str,
    other_targets: str,
    eps: float,
    backend: str,
    workspace: int | None,
) -> list[Tensor]:
    """[corr, depth, best, confidence, dtemperature, *dembeddings, *dkeys]; gradients as far as needed."""
    config: Any = {"negatives": negatives, "other_targets": other_targets, "backend": backend}
    return terms_and_gradients(
        Stacks(list(embeddings), list(keys), list(duals)), MatchIndex.from_tensors(list(index)), temperature,
        corr_weights, depth_weights, needs, LossConfig(eps=eps, workspace=workspace, **config),
    )  # fmt: skip


def terms_and_gradients(
    stacks: Stacks,
    index: MatchIndex,
    temperature: Tensor,
    corr_weights: Tensor | None,
    depth_weights: Tensor | None,
    needs: Sequence[bool],
    config: LossConfig,
) -> list[Tensor]:
    """What `unreduced_terms` returns."""
    weights = None if corr_weights is None or depth_weights is None else TermWeights(corr_weights, depth_weights)
    terms, gradients = _terms_and_gradients(stacks, index, temperature, weights, needs, config)
    return [*terms, *gradients]


@unreduced_terms.register_fake
def _(
    embeddings: Sequence[Tensor], keys: Sequence[Tensor], duals: Sequence[Tensor], index: Sequence[Tensor],
    temperature: Tensor,
    corr_weights: Tensor | None, depth_weights: Tensor | None, needs: Sequence[bool], *_: Any,
) -> list[Tensor]:  # fmt: skip
    return [*_fake_terms(embeddings, index), *_fake_gradients(embeddings, keys, temperature, needs)]


@torch.library.custom_op("gasp_fast::frame_match", mutates_args=())
def frame_match(
    embeddings: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Sequence[Tensor],  # RowIndex.tensors()
    longest: int,  # P, the frames of the longest sequence
    temperature: Tensor,
    values: Tensor | None,  # float32 [N, V]
    known: Tensor | None,  # float32 [N]
    exclude_own: bool,
    backend: str,
    workspace: int | None,
) -> list[Tensor]:
    """[lse, known_lse, expected, best, peak], each [L, A, P]."""
    row_index, tau = RowIndex.from_tensors(list(rows)), _kernel_temperature(temperature, embeddings)
    with _without_autocast(embeddings):
        parts = [
            ENGINES[backend](stack, workspace).frame_match(
                Problem(stack, stack_keys, row_index, tau, values, known, exclude_own)
            )[:5]
            for _, stack, stack_keys, _ in Stacks(list(embeddings), list(keys))
        ]
    return [torch.cat(statistic) if len(statistic) > 1 else statistic[0] for statistic in zip(*parts, strict=True)]


@frame_match.register_fake
def _(
    embeddings: Sequence[Tensor], keys: Sequence[Tensor], rows: Sequence[Tensor], longest: int, temperature: Tensor,
    values: Tensor | None, *_: Any,
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
    keys: Sequence[Tensor],
    rows: Sequence[Tensor],
    temperature: Tensor,
    needs: Sequence[bool],
    values: Tensor | None,
    known: Tensor | None,
    exclude_own: bool,
    statistics: Sequence[Tensor],  # what `frame_match` returned
    lse_gradient: Tensor,  # float32 [L, A, P]
    expected_gradient: Tensor,  # float32 [L, A, P, V]
    backend: str,
    workspace: int | None,
) -> list[Tensor]:
    """[dtemperature, *dembeddings, *dkeys]; gradients as far as needed."""
    row_index, tau = RowIndex.from_tensors(list(rows)), _kernel_temperature(temperature, embeddings)
    stacks = Stacks(list(embeddings), list(keys))
    memory = GradientMemory(stacks, needs)
    with _without_autocast(embeddings):
        for number, (layers, stack, stack_keys, _) in enumerate(stacks):
            memory.temperature = _sum(memory.temperature, ENGINES[backend](stack, workspace).frame_match_gradient(
                Problem(stack, stack_keys, row_index, tau, values, known, exclude_own),
                FrameStatistics.of(value[layers] for value in statistics),
                FrameUpstream(lse_gradient[layers], expected_gradient[layers]),
                memory.of_stack(number, layers, stack),
            ))  # fmt: skip
    return memory.tensors(temperature)


@frame_match_gradient.register_fake
def _(
    embeddings: Sequence[Tensor], keys: Sequence[Tensor], rows: Sequence[Tensor], temperature: Tensor,
    needs: Sequence[bool], *_: Any,
) -> list[Tensor]:  # fmt: skip
    return _fake_gradients(embeddings, keys, temperature, needs)


def _terms_and_gradients(
    stacks: Stacks,
    index: MatchIndex,
    temperature: Tensor,
    weights: TermWeights | None,
    needs: Sequence[bool],
    config: LossConfig,
    scale: Tensor | None = None,  # float32 [L], written for float16: see `Gradients`
) -> tuple[MatchTerms, list[Tensor]]:
    """Terms [L, M], and [dtemperature, *dembeddings, *dkeys]."""
    embeddings = stacks.embeddings
    terms = MatchTerms.empty(layer_count(embeddings), index.order.shape[0], embeddings[0].device)
    memory, tau = GradientMemory(stacks, needs, scale), _kernel_temperature(temperature, embeddings)
    definition = TermDefinition(config.negatives, config.other_targets, config.eps)
    with _without_autocast(embeddings):
        for number, (layers, stack, keys, duals) in enumerate(stacks):
            problem = Problem(stack, keys, index.rows, tau, index.values, index.known, exclude_own=True, duals=duals)
            engine = ENGINES[config.backend](stack, config.workspace)
            memory.temperature = _sum(memory.temperature, engine.terms_and_gradients(
                problem, index, None if weights is None else weights.of_layers(layers), terms.of_layers(layers),
                definition, memory.of_stack(number, layers, stack),
            ))  # fmt: skip
    return terms, memory.tensors(temperature)


@dataclass(frozen=True)
class Stacks:
    """Embeddings, keys and duals as stacks of layers [G, N, D]; iterates over (layers, the three of them)."""

    embeddings: list[Tensor]
    keys: list[Tensor] = field(default_factory=list)  # empty: the embeddings
    duals: list[Tensor] = field(default_factory=list)  # empty: none

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.embeddings, self.keys, self.duals

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        start = 0
        for number, embeddings in enumerate(self.embeddings):
            stack = embeddings if embeddings.dim() == 3 else embeddings[None]
            keys = self.keys[number].view_as(stack) if self.keys else stack
            duals = self.duals[number].view_as(stack) if self.duals else None
            yield slice(start, start + len(stack)), stack, keys, duals
            start += len(stack)


class GradientMemory:
    """Memory for the gradients of embeddings and keys, and the gradient of the temperature, summed over the stacks."""

    def __init__(self, stacks: Stacks, needs: Sequence[bool], scale: Tensor | None = None) -> None:
        self.needs_temperature, needs_embeddings, needs_keys = needs
        self.embeddings = [_contiguous_like(e) for e in stacks.embeddings] if needs_embeddings else []
        self.shared = not stacks.keys
        self.keys = [_contiguous_like(k) for k in stacks.keys] if needs_keys else []
        self.temperature: Tensor | None = None
        self.scale = scale if stacks.embeddings[0].dtype == torch.float16 else None

    def of_stack(self, number: int, layers: slice, stack: Tensor) -> Gradients:
        embeddings = self.embeddings[number].view(stack.shape) if self.embeddings else None
        keys = self.keys[number].view(stack.shape) if self.keys else None
        keys = embeddings if self.shared else keys
        return Gradients(embeddings, keys, self.needs_temperature, None if self.scale is None else self.scale[layers])

    def tensors(self, temperature: Tensor) -> list[Tensor]:
        gradient = _empty_gradient(temperature, needed=False)
        if self.temperature is not None:
            gradient = self.temperature.to(temperature)
        return [gradient, *self.embeddings, *self.keys]


def _new_scale(layer_weights: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    """Memory for the scale of the gradients: float32 [L] for float16, else [0]."""
    layers = layer_weights.shape[0] if embeddings[0].dtype == torch.float16 else 0
    return layer_weights.new_ones(layers, dtype=torch.float32)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part


def _kernel_temperature(temperature: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    return temperature.detach().to(device=embeddings[0].device, dtype=torch.float32, non_blocking=True)


def _without_autocast(embeddings: Sequence[Tensor]) -> torch.autocast:
    """Products inside an operator run in their own types, also under a caller's autocast."""
    return torch.autocast(embeddings[0].device.type, enabled=False)


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_gradient(temperature: Tensor, needed: bool) -> Tensor:
    """[], or [0] where the gradient of the temperature is not needed."""
    return torch.empty_like(temperature) if needed else temperature.new_empty(0)


def _fake_terms(embeddings: Sequence[Tensor], index: Sequence[Tensor]) -> list[Tensor]:
    matches = MatchIndex.from_tensors(list(index)).order.shape[0]
    corr = embeddings[0].new_empty((layer_count(embeddings), matches), dtype=torch.float32)
    return [corr, torch.empty_like(corr), torch.empty_like(corr, dtype=torch.int64), torch.empty_like(corr)]


def _fake_gradients(
    embeddings: Sequence[Tensor], keys: Sequence[Tensor], temperature: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    needs_temperature, needs_embeddings, needs_keys = needs
    needed = [*(embeddings if needs_embeddings else []), *(keys if needs_keys else [])]
    return [_empty_gradient(temperature, needs_temperature), *map(_contiguous_like, needed)]
