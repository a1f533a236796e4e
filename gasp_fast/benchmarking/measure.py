"""Times variants in interleaved rounds, after comparing each with a float64 reference.

All variants run once in each round, so a machine that slows down slows all of them. Reports medians over rounds,
and their ratios to the medians of the bare products (the floor) in the same rounds. A variant whose loss or gradient is
wrong on a smaller problem is not timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from gasp_fast.files import one_line

from .variants import VARIANTS, Loss, Variant, floor, reference
from .workloads import Problem, Workload

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}  # of a loss and of its gradient


@dataclass
class Row:
    """One variant on one workload. Times in milliseconds, memory in MiB above the problem itself."""

    variant: str
    solves: str
    note: str = ""  # why it was not timed
    error: float | None = None  # largest relative error of loss and gradient against float64
    forward: list[float] = field(default_factory=list)  # one time a round
    both: list[float] = field(default_factory=list)  # forward and backward
    peak_mib: float | None = None


@dataclass
class Result:
    """All variants on one workload, and the times of the bare products in the same rounds."""

    workload: Workload
    one_product: list[float]
    three_products: list[float]
    rows: list[Row]


def run_workload(
    workload: Workload,
    device: torch.device,
    rounds: int = 20,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Result:
    """Compare every variant (or `only` some) with its reference, then time those that pass."""
    problem = workload.build(device)
    rows, timed = [], []
    for variant in VARIANTS:
        if only and variant.name not in only:
            continue
        progress(f"{workload.name}: comparing {variant.name} with float64")
        row = checked(variant, workload, device)
        rows.append(row)
        if not row.note:
            row.note, row.peak_mib = _warm_up(variant, problem)
        if not row.note:
            timed.append((variant, row))
    one, three = floor(problem)
    one(), three()
    result = Result(workload, [], [], rows)
    for nth in range(rounds):
        progress(f"{workload.name}: round {nth + 1} of {rounds}")
        result.one_product.append(_milliseconds(one, device))
        result.three_products.append(_milliseconds(three, device))
        for variant, row in timed:
            row.forward.append(_milliseconds(partial(forward_pass, variant.loss, problem), device))
            row.both.append(_milliseconds(partial(forward_and_backward, variant.loss, problem), device))
    return result


def checked(variant: Variant, workload: Workload, device: torch.device) -> Row:
    """A row without times. Its note says why the variant must not be timed, if so."""
    row = Row(variant.name, variant.solves, note=variant.unavailable(device))
    if row.note:
        return row
    problem = workload.cut_down().build(device, seed=1)
    try:
        loss, gradient = forward_and_backward(variant.loss, problem)
    except Exception as error:  # another library may raise anything
        row.note = f"fails: {type(error).__name__}: {one_line(error)[:60]}"
        return row
    exact = replace(problem, embeddings=problem.embeddings.double())
    true_loss, true_gradient = forward_and_backward(reference(variant.solves), exact)
    row.error = max(_relative_error(loss, true_loss), _relative_error(gradient, true_gradient))
    if not row.error <= TOLERANCE[workload.dtype]:
        row.note = f"refused: wrong by {row.error:.1e}"
    return row


def forward_pass(loss: Loss, problem: Problem) -> None:
    with torch.no_grad():
        loss(problem.embeddings, problem.matches)


def forward_and_backward(loss: Loss, problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the embeddings."""
    leaf = problem.embeddings.detach().requires_grad_()
    value = loss(leaf, problem.matches)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _warm_up(variant: Variant, problem: Problem) -> tuple[str, float | None]:
    """Run twice and measure the peak of memory: ("", MiB), or why it does not run at this size."""
    device = problem.embeddings.device
    try:
        forward_and_backward(variant.loss, problem)  # compiles, tunes and allocates what is needed only once
        return "", _peak_mib(partial(forward_and_backward, variant.loss, problem), device)
    except torch.OutOfMemoryError:
        _free_memory(device)
        return "out of memory", None
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return "out of memory", None


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """The time of one call, by the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def _peak_mib(work: Callable[[], object], device: torch.device) -> float:
    """Peak of the memory that one call allocates."""
    if device.type == "cuda":
        _free_memory(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak / 2**20


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())
