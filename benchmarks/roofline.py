"""Predicts how long the loss takes on a GPU, as a multiple of its bare matrix products. Needs no GPU.

    PYTHONPATH=. python benchmarks/roofline.py            # tables for an H200 and an H100
    PYTHONPATH=. python benchmarks/roofline.py --json     # the same as JSON, with the constants and all residuals

`roofline_trace` records what `gasp_loss` runs: block sizes, launches and bytes are those of the engine. `roofline_sass`
compiles each kernel and counts its instructions. `roofline_model` turns both into time, with constants fitted to
measurements on an H200; `roofline_product` does it for the forward pass that stores no similarities.
The kernels of one call run one after another, so their times are added, and the host is late if all its operations take
longer. A Triton kernel that is not in `ROW_KERNELS` or in `time_of` is an error, and so is a call whose products are
fewer than the loss needs: nothing is free because it is unknown.

The upstream gradient is 1, as in `gasp-fast bench`: nothing is scaled. `--upstream 2` predicts for another number.

Two more assumptions were not measured. An H100 differs from an H200 in the bandwidth of its memory and the size of its
cache only. A kernel finds in the cache what the kernels just before it touched, as far as it fits (`Cache`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import roofline_model as model
import roofline_past as past
import roofline_product as product
from roofline_model import Constants, Device
from roofline_sass import compile_launch, compile_product
from roofline_trace import WRITES_SOME_ROWS, Launch, Product, Region, Trace, Work, trace_loss

from gasp_fast.benchmarking.workloads import GPU_SET, WORKLOADS, Workload

WORKSPACES, DEFAULT_WORKSPACE = (128, 256, 512, 1024), 256  # MiB
# Ratios to reach: (forward and backward, workspace in MiB), and of the forward pass alone.
TARGETS = {("w1", 256): 1.25, ("w3", 256): 1.4, ("w2", 256): 1.8, ("w4", 256): 3.0, ("w5", 256): 2.0, ("w5", 1024): 1.5}
FORWARD_TARGETS = {("w1", 256): 1.4}
# Microseconds of the host. An operation of torch took 10 to 15 on the machine of the H200; a direct Triton launch does
# about as much in Python. Triton's own launch of a kernel with 40 arguments took 60 to 100. Views and allocations do
# not reach the driver.
HOST_OPERATION, HOST_DIRECT_LAUNCH, HOST_LAUNCH, HOST_VIEW = 15.0, 15.0, 80.0, 2.0
# Kernels of torch that do not read and write vectors.
SCATTERED = WRITES_SOME_ROWS | {"mul_"}
# Triton kernels whose time is that of `model.row_time`.
ROW_KERNELS = {
    "inverse_norms", "frame_statistics", "loss_terms", "similarity_gradient", "add_rows", "gather_rows",
    "project_gradient", "add_transposed", "gather_columns", "merge_parts",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is predicted, beside the workload and the device."""

    backward: bool
    fused: bool = True  # a forward pass alone may use `product_statistics`
    upstream: float = 1.0
    correction: float = 1.0  # how much longer the bare products of this workload took than the model says


@dataclass
class Prediction:
    workload: str
    device: str
    workspace: int  # MiB
    backward: bool
    fused: bool
    upstream: float
    blocks: str
    milliseconds: float
    host: float  # milliseconds
    floor: float
    ratio: float
    target: float | None
    product_flops: int
    shares: dict[str, float]  # milliseconds by kind of work

    @property
    def dominates(self) -> str:
        extra = Counter(self.shares)
        if self.host > sum(self.shares.values()):
            return f"host {self.host:.1f} ms"
        return ", ".join(f"{name} {value:.1f}" for name, value in extra.most_common(3))


class Cache:
    """What of recently touched memory a kernel still finds in the second-level cache.

    A kernel that touches more than fits leaves the same share of all it touched. Older memory goes first.
    """

    def __init__(self, size: float) -> None:
        self.size = size
        self.held: dict[int, tuple[int, int, float]] = {}  # by storage, oldest first: start, end, share that is held

    def touch(self, work: Work) -> float:
        """Bytes of `work.reads` that are found; then holds what the work touched."""
        found = sum(self._found(region) for region in work.reads)
        touched = {region.storage: region for region in [*work.reads, *work.writes]}
        total = sum(region.size for region in touched.values())
        for region in touched.values():
            self.held.pop(region.storage, None)
            self.held[region.storage] = region.start, region.start + region.size, min(1.0, self.size / max(1, total))
        while sum((end - start) * share for start, end, share in self.held.values()) > self.size * 1.0001:
            self.held.pop(next(iter(self.held)))
        return found

    def _found(self, region: Region) -> float:
        start, end, share = self.held.get(region.storage, (0, 0, 0.0))
        return share * max(0, min(end, region.start + region.size) - max(start, region.start))


def needed_flops(workload: Workload, backward: bool) -> int:
    """Of the products of a folded block: the gradients of anchors, and that of the other tokens (`fold_kernels`)."""
    anchors, tokens = workload.anchors, workload.tokens
    pairs = anchors * (3 * tokens - anchors) if backward else anchors * tokens
    return 2 * workload.layers * workload.width * pairs


def predict(
    workload: Workload, device: Device, workspace: int, case: Case, constants: Constants, trace: Trace
) -> Prediction:
    """`case.correction` is found here."""
    flops = _product_flops(trace)
    if flops < needed_flops(workload, case.backward):
        raise ValueError(f"{workload.name}: {flops:.3g} operations in products were traced, fewer than the loss needs")
    shape, products = (workload.layers, workload.anchors, workload.tokens, workload.width), 3 if case.backward else 1
    measured = model.measured_floors()[workload.name][1 if case.backward else 0]
    case = replace(case, correction=measured / model.floor_time(constants.product, model.H200, *shape, products))
    floor = model.floor_time(constants.product, device, *shape, products) * case.correction
    shares: Counter[str] = Counter()
    cache = Cache(model.CACHE_SHARE * device.cache)
    for work in trace.work:
        name, seconds = time_of(work, cache.touch(work), device, constants, case)
        shares[name] += seconds
    shares["pauses"] = constants.pause.seconds(len(trace.work))
    host = _host_time(trace)
    total = max(sum(shares.values()), host)
    targets = TARGETS if case.backward else {} if case.fused else FORWARD_TARGETS
    return Prediction(
        workload.name, device.name, workspace, case.backward, case.fused, case.upstream, _blocks(trace), 1e3 * total,
        1e3 * host, 1e3 * floor, total / floor, targets.get((workload.name, workspace)), flops,
        {name: 1e3 * value for name, value in shares.items()},
    )  # fmt: skip


def time_of(work: Work, cached: float, device: Device, constants: Constants, case: Case) -> tuple[str, float]:
    """(kind of work, seconds); `cached` bytes of what it reads are in the second-level cache."""
    moved = sum(region.size for region in [*work.reads, *work.writes])
    if isinstance(work, Product):
        shape = work.m, work.n, work.k, work.out_bytes, work.accumulate, work.batch
        return "products", case.correction * model.product_time(constants.product, device, *shape)
    if not isinstance(work, Launch):
        return f"torch {work.name}", model.torch_time(constants.torch, device, moved, work.name in SCATTERED)
    if work.name == "product_statistics":
        compiled = compile_product(work.kernel, work.tile, work.arguments, work.constants)
        return work.name, product.product_statistics_time(constants, device, work, compiled, case.correction)
    if work.name not in ROW_KERNELS | {"scale"}:
        raise ValueError(
            f"the model does not know the Triton kernel {work.name!r}; add it to `ROW_KERNELS` or `time_of`"
        )
    code = compile_launch(work.kernel, work.tile, work.arguments, work.constants)
    passes = -(-work.numbers // (work.programs * work.tile.rows * work.tile.columns))
    if work.name == "scale" and case.upstream == 1:  # each program reads that number and ends
        code, moved, cached = replace(code, loop=0, outside=0), 0, 0
    return work.name, model.row_time(
        constants.row, device, work.programs, passes, code, moved - cached, cached, work.name
    )


def _host_time(trace: Trace) -> float:
    launches = trace.of(Launch)
    direct = sum(launch.kernel.direct for launch in launches)
    operations = len(trace.work) - len(launches)
    host = direct * HOST_DIRECT_LAUNCH + (len(launches) - direct) * HOST_LAUNCH + operations * HOST_OPERATION
    return 1e-6 * (host + (trace.views + trace.allocations) * HOST_VIEW)


def _product_flops(trace: Trace) -> int:
    by_library = sum(2 * work.batch * work.m * work.n * work.k for work in trace.of(Product))
    return by_library + sum(product.flops(work) for work in trace.of(Launch) if work.name == "product_statistics")


def _blocks(trace: Trace) -> str:
    """Layers x rows of the first similarity product, and its columns."""
    products = trace.of(Product)
    return f"{products[0].batch} x {products[0].m}, {products[0].n} columns" if products else "one kernel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=GPU_SET, default=list(GPU_SET), metavar="NAME")
    parser.add_argument("--workspace", nargs="+", type=int, default=list(WORKSPACES), metavar="MIB")
    parser.add_argument("--upstream", type=float, default=1.0, help="gradient of the loss (1: nothing to scale)")
    parser.add_argument("--json", action="store_true", help="print JSON: constants, residuals, predictions")
    arguments = parser.parse_args()
    fit = model.fitted()
    checks = past.compared(fit.constants)
    # The kernel that stores no similarities needs no workspace: the default stands for all.
    training = [(workspace, Case(True, upstream=arguments.upstream)) for workspace in arguments.workspace]
    chunked = [(workspace, Case(False, fused=False)) for workspace in arguments.workspace]
    fused = [(DEFAULT_WORKSPACE, Case(False))]
    predictions = [
        predict(WORKLOADS[name], device, workspace, case, fit.constants, trace)
        for name in arguments.workload
        for cases in (training, chunked, fused)
        for workspace, case in cases
        for trace in [traced(name, workspace, case.backward, case.fused)]
        for device in (model.H200, model.H100)
    ]
    if arguments.json:
        record = {"constants": asdict(fit.constants), "residuals": fit.residuals, "earlier design": checks}
        print(json.dumps(record | {"predictions": [asdict(prediction) for prediction in predictions]}, indent=1))
        return
    print_fit(fit, checks)
    print_table(
        [p for p in predictions if p.backward],
        f"Forward and backward, upstream {arguments.upstream:g} / three products",
    )
    print_table([p for p in predictions if not p.backward and not p.fused], "Forward alone, chunked / one product")
    print_table(
        [p for p in predictions if not p.backward and p.fused], "Forward alone, product_statistics / one product"
    )


@cache
def traced(name: str, workspace: int, backward: bool, fused: bool) -> Trace:
    return trace_loss(WORKLOADS[name], workspace, backward, fused)


def print_fit(fit: model.Fit, checks: dict[str, dict[str, float]]) -> None:
    print("Constants fitted to h200-2026-11-26 and h200-2026-11-27 in benchmarks/results; model against measurement:")
    for group, residuals in fit.residuals.items():
        largest = max(residuals, key=lambda name: abs(residuals[name]))
        print(f"  {group:14s} {len(residuals):3d} values, rms {fit.rms(group):.1%}, ", end="")
        print(f"largest {residuals[largest]:+.0%} ({largest})")
    print("The design of commit f722f58 as a whole, forward and backward, ratio to three products:")
    for name, check in checks.items():
        print(f"  {name:14s} model {check['model']:5.2f}, measured {check['measured']:5.2f} ({check['error']:+.0%})")


def print_table(predictions: list[Prediction], title: str) -> None:
    print(f"\n{title}: PREDICTED")
    print("  load GPU    MiB  ratio  target      ms   host  first product            most time, ms")
    for p in predictions:
        target = "" if p.target is None else f"{p.target:.2f} {'ok' if p.ratio <= p.target else 'NO'}"
        print(f"  {p.workload:5s}{p.device:6s}{p.workspace:5}{p.ratio:7.2f}{target:>8s}", end="")
        print(f"{p.milliseconds:8.1f}{p.host:7.1f}  {p.blocks:24s} {p.dominates}")


if __name__ == "__main__":
    main()
