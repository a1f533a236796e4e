"""Clockwork: interleaved rounds, medians, memory, and a judge that sees every variant first.

Variants run in turn within each round, so a machine that slows down slows all of them; what is quoted is the median
over rounds, and the ratio of medians to the floor measured in the same rounds. A variant whose loss or gradient is
wrong on a cut-down problem is not timed at all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .variants import VARIANTS, Variant, floor, judge
from .workloads import Problem, Workload

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}  # of a loss and of its gradient


@dataclass
class Row:
    """One variant on one workload. Times in milliseconds, memory in MiB above the problem itself."""

    variant: str
    solves: str
    note: str = ""  # why there are no numbers
    error: float | None = None  # worst relative error of loss and gradient against float64
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    def median(self, which: str) -> float | None:
        samples = getattr(self, which)
        return statistics.median(samples) if samples else None

    def backward(self) -> float | None:
        """What backward adds to a forward pass without gradient."""
        forward, both = self.median("forward"), self.median("both")
        return None if forward is None or both is None else both - forward


@dataclass
class Result:
    workload: Workload
    one_product: list[float]
    three_products: list[float]
    rows: list[Row]


def run_workload(
    workload: Workload,
    device: torch.device,
    rounds: int = 20,
    only: Sequence[str] | None = None,
    tick: Callable[[str], None] = lambda what: None,
) -> Result:
    problem = workload.build(device)
    rows, runners = [], []
    for variant in VARIANTS:
        if only and variant.name not in only:
            continue
        tick(f"{workload.name}: judging {variant.name}")
        row = judged(variant, workload, device)
        rows.append(row)
        if not row.note:
            row.note, row.peak_mib = _first_run(variant, problem)
        if not row.note:
            runners.append((variant, row))
    one, three = floor(problem)
    one(), three()
    result = Result(workload, [], [], rows)
    for at in range(rounds):
        tick(f"{workload.name}: round {at + 1} of {rounds}")
        result.one_product.append(_timed(one, device))
        result.three_products.append(_timed(three, device))
        for variant, row in runners:
            row.forward.append(_timed(_forward(variant, problem), device))
            row.both.append(_timed(_both(variant, problem), device))
    return result


def judged(variant: Variant, workload: Workload, device: torch.device) -> Row:
    """A row without times: refused, or fit to be timed."""
    row = Row(variant.name, variant.solves, note=variant.available(device))
    if row.note:
        return row
    problem = workload.cut_down().build(device, seed=1)
    try:
        found, gradient = _loss_and_gradient(lambda e: variant.loss(e, problem.matches), problem.embeddings)
    except Exception as error:  # a peer may fail in any way; the table says how
        row.note = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
        return row
    truth, true_gradient = _loss_and_gradient(
        lambda e: judge(variant.solves, e, problem.matches), problem.embeddings.double()
    )
    row.error = max(_relative(found, truth), _relative(gradient, true_gradient))
    if not row.error <= TOLERANCE[workload.dtype]:
        row.note = f"refused: wrong by {row.error:.1e}"
    return row


def _first_run(variant: Variant, problem: Problem) -> tuple[str, float | None]:
    """Warm up, and note the peak of memory: ("", MiB), or why it does not run at this size."""
    try:
        _both(variant, problem)()  # compiles, tunes and allocates what is only once
        return "", _peak_mib(_both(variant, problem), problem.embeddings.device)
    except torch.OutOfMemoryError:
        _drop_memory(problem.embeddings.device)
        return "out of memory", None
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return "out of memory", None


def _forward(variant: Variant, problem: Problem) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            variant.loss(problem.embeddings, problem.matches)

    return run


def _both(variant: Variant, problem: Problem) -> Callable[[], None]:
    def run() -> None:
        leaf = problem.embeddings.detach().requires_grad_()
        variant.loss(leaf, problem.matches).backward()

    return run


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Milliseconds, by the device's own clock where it has one."""
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


def _peak_mib(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        _drop_memory(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak / 2**20


def _drop_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _loss_and_gradient(loss: Callable[[Tensor], Tensor], embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())
