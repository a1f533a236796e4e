"""Compares a backend with `naive_loss` in float64. The checks are the same for every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import gasp_fast
from gasp_fast.kernels import rows_cpp
from gasp_fast.kernels.chunked import ChunkedEngine
from gasp_fast.kernels.engines import ENGINES
from gasp_fast.loss.naive import NaiveLoss, naive_loss

from .problems import Problem, relative_error

EXACT = 1e-5  # float32, IEEE
SIXTEEN_BITS = 1e-2  # bfloat16 and float16


def run(problem: Problem, embeddings: Tensor, backend: str, **options):
    """Loss, gradients of embeddings (see `gradient_of`) and temperature, and the output."""
    embeddings, beside = leaves(problem, embeddings)
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(problem.temperature, dtype=wide, requires_grad=True)
    out = gasp_fast.gasp_loss(
        in_given_metric(embeddings, beside), problem.matches, keys=beside.get("keys"), temperature=temperature,
        negatives=problem.negatives, other_targets=problem.other_targets, return_metrics=True, backend=backend,
        **options,
    )  # fmt: skip
    weighted_sum(out.loss).backward()
    return out.loss.detach(), gradient_of(embeddings, **beside), temperature.grad, out


def leaves(problem: Problem, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings, and keys or metric in the same type, as leaves that require grad."""
    given = {"keys": problem.keys, "metric": problem.metric}
    beside = {name: of.to(embeddings.dtype).clone().requires_grad_() for name, of in given.items() if of is not None}
    return embeddings.detach().clone().requires_grad_(), beside


def in_given_metric(embeddings: Tensor, beside: dict[str, Tensor]) -> Tensor | gasp_fast.InMetric:
    """What `gasp_loss` takes as embeddings."""
    return gasp_fast.in_metric(embeddings, beside["metric"]) if "metric" in beside else embeddings


def gradient_of(embeddings: Tensor, keys: Tensor | None = None, metric: Tensor | None = None) -> Tensor:
    """That of the keys after it; or that of the metric, whose symmetric part counts, times the largest inverse norm: a
    gradient of embeddings has the size of inverse norms, one of the metric does not depend on them."""
    if metric is not None:
        size = float(inverse_norms(embeddings.detach()).max())
        return torch.cat([embeddings.grad.flatten(), size * (metric.grad + metric.grad.mT).flatten() / 2])
    return embeddings.grad if keys is None else torch.stack([embeddings.grad, keys.grad])


def inverse_norms(embeddings: Tensor) -> Tensor:
    return embeddings.double().norm(dim=-1).clamp(min=1e-12).reciprocal()


@dataclass(frozen=True)
class Truth:
    """The values that a backend must give, computed by `naive_loss`."""

    loss: Tensor
    embedding_gradient: Tensor
    temperature_gradient: Tensor
    corr_per_layer: Tensor
    depth_per_layer: Tensor
    accuracy: Tensor
    pck: Tensor
    confidence: Tensor


def judge(problem: Problem, embeddings: Tensor | None = None, reduction: str = "mean", **options) -> Truth:
    """The correct values for these embeddings (by default the problem's own), in float64."""
    rounded = problem.embeddings if embeddings is None else embeddings
    embeddings, beside = leaves(problem, rounded)
    embeddings, *others = (leaf.detach().double().requires_grad_() for leaf in (embeddings, *beside.values()))
    beside = dict(zip(beside, others, strict=True))
    temperature = torch.tensor(problem.temperature, dtype=torch.float64, requires_grad=True)
    matches = problem.matches
    out: NaiveLoss = naive_loss(
        embeddings, matches, temperature, problem.negatives, reduction=reduction, **beside,
        other_targets=problem.other_targets, **options,
    )  # fmt: skip
    weighted_sum(out.loss).backward()
    weight = torch.ones(len(matches)).double() if matches.weight is None else matches.weight.double()
    share, depth_share = (
        part / torch.where(part.sum() > 0, part.sum(), 1) for part in (weight, weight * out.has_depth)
    )
    corr_weight, depth_weight = (weight, weight) if reduction == "sum" else (share, depth_share)
    offset = matches.token_xy[out.best] - matches.token_xy[matches.target]  # [L, M, 2]
    return Truth(
        loss=out.loss.detach(),
        embedding_gradient=gradient_of(embeddings, **beside),
        temperature_gradient=temperature.grad,
        corr_per_layer=(out.corr.detach() * corr_weight).sum(1),
        depth_per_layer=(out.depth.detach() * depth_weight).sum(1),
        accuracy=((out.best == matches.target) * share).sum(1),
        pck=((offset.square().sum(-1) <= 2**2) * share).sum(1),
        confidence=(out.confidence.detach() * share).sum(1),
    )


def weighted_sum(loss: Tensor) -> Tensor:
    """The loss itself; under reduction "none" the sum of its terms [L, M], each with a different weight."""
    return (loss * upstream(loss.numel(), loss.dtype).view(loss.shape)).sum() if loss.dim() else loss


def upstream(count: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 2, count, dtype=dtype)


def natural_sizes(problem: Problem, reduction: str = "mean") -> dict[str, float]:
    """Sizes of the loss and its gradients when nothing cancels: similarities of 1 / tau, each with its full weight."""
    layers, matches = problem.embeddings.shape[0], len(problem.matches)
    weights = {"mean": min(1, matches), "sum": matches}
    weights["none"] = float(upstream(layers * matches, torch.float64).abs().sum())
    weight = weights[reduction]
    both = problem.embeddings if problem.keys is None else torch.stack([problem.embeddings, problem.keys])
    tau = problem.temperature
    return {"loss": weight / tau, "dE": weight / tau * float(inverse_norms(both).max()), "dtau": weight / tau**2}


def assert_agrees(problem: Problem, dtype: torch.dtype, tolerance: float, backend: str, **options) -> None:
    if dtype.itemsize == 2:
        # Duals are rounded, as longer embeddings would be. No fixed bound holds then, but that of dense arithmetic:
        # `test_error_is_at_most_twice_that_of_dense_arithmetic_in_the_same_type`.
        problem = replace(problem, metric=None)
    rounded = problem.embeddings.to(dtype)
    truth = judge(problem, rounded, **options)
    loss, embedding_gradient, temperature_gradient, out = run(problem, rounded, backend, **options)
    assert out.backend == backend
    assert embedding_gradient.dtype == dtype
    natural = natural_sizes(problem, **options)
    assert relative_error(loss, truth.loss, natural["loss"]) <= tolerance
    assert relative_error(embedding_gradient, truth.embedding_gradient, natural["dE"]) <= tolerance
    assert relative_error(temperature_gradient, truth.temperature_gradient, natural["dtau"]) <= tolerance
    size = natural_sizes(problem)["loss"]  # the size of a mean, also if the loss is a sum: the stricter one
    assert relative_error(out.corr_per_layer, truth.corr_per_layer, size) <= tolerance
    assert relative_error(out.depth_per_layer, truth.depth_per_layer, size) <= tolerance


@contextmanager
def cpp_workspace(workspace_bytes: int) -> Iterator[None]:
    """Runs the "cpp" backend with this workspace: a small one splits even a small problem into several chunks."""
    engine = ChunkedEngine(operations=rows_cpp, workspace_bytes=workspace_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "cpp", lambda embeddings, workspace: engine)
        yield
