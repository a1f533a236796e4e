"""One backend against the dense reference in float64: the same questions for every backend."""

from __future__ import annotations

import torch

import gasp_fast

from .problems import Problem, relative_error

EXACT = 1e-5  # float32, IEEE
NARROW = 1e-2  # bfloat16 and float16


def run(problem: Problem, embeddings: torch.Tensor, backend: str, **options):
    """Loss, gradients of embeddings and temperature, and the output."""
    embeddings = embeddings.detach().clone().requires_grad_()
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(problem.temperature, dtype=wide, requires_grad=True)
    out = gasp_fast.gasp_loss(
        embeddings, problem.matches, temperature, problem.negatives, return_metrics=True, backend=backend, **options
    )
    loss = out.loss
    if loss.dim():
        loss = (loss * upstream(loss.numel(), loss.dtype).view(loss.shape)).sum()
    loss.backward()
    return loss.detach(), embeddings.grad, temperature.grad, out


def upstream(count: int, dtype: torch.dtype) -> torch.Tensor:
    """What the losses of reduction "none", one for each layer and match, are multiplied with."""
    return torch.linspace(-1, 2, count, dtype=dtype)


def natural_sizes(problem: Problem, reduction: str = "mean") -> dict[str, float]:
    """Loss, dE and dtau where nothing cancels: similarities of 1 / tau, each differentiated at full weight."""
    layers, matches = problem.embeddings.shape[0], len(problem.matches)
    weights = {"mean": min(1, matches), "sum": matches}
    weights["none"] = float(upstream(layers * matches, torch.float64).abs().sum())
    weight = weights[reduction]
    inverse_norms = problem.embeddings.norm(dim=-1).clamp(min=1e-12).reciprocal()
    tau = problem.temperature
    return {"loss": weight / tau, "dE": weight / tau * float(inverse_norms.max()), "dtau": weight / tau**2}


def assert_agrees(problem: Problem, dtype: torch.dtype, tolerance: float, backend: str, **options) -> None:
    rounded = problem.embeddings.to(dtype)
    truth = run(problem, rounded.double(), "torch", **options)
    found = run(problem, rounded, backend, **options)
    assert found[3].backend == backend
    natural = natural_sizes(problem, **options)
    for name, ours, theirs in zip(natural, found, truth, strict=False):
        assert relative_error(ours, theirs, natural[name]) <= tolerance, name
    assert found[1].dtype == dtype
    size = natural_sizes(problem)["loss"]  # means, whatever the reduction of the loss
    for name in ("corr_per_layer", "depth_per_layer"):
        assert relative_error(getattr(found[3], name), getattr(truth[3], name), size) <= tolerance, name
