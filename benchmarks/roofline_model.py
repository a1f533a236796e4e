"""How long a piece of work takes on a GPU: formulas with few constants, fitted to what an H200 measured.

    product        computing: its result is cut into tiles, as many as there are multiprocessors at once; the cost of a
                   tile is its inner dimension and a start. Where tiles are few, the library divides the inner dimension
                   and adds up the parts. Moving: its operands and results.
    row kernel     issuing its instructions; moving what it reads and writes; waiting, once for each pass of its loop
    torch kernel   moving what it reads and writes

The parts of one kernel overlap, but not fully: their times are added as a norm, `(a^p + b^p)^(1/p)`, with a fitted `p`
(1 is a sum, infinity the largest). `fitted` reads the measurements of two days and returns the constants with the
residual of every measurement: `results/h200-2026-11-26`, an earlier design and bare products, and `kernels.json` of
`results/h200-2026-11-27`, the kernels of the present one. Products of the second day are compared with each other,
within a run: the clock of a GPU depends on what it has done before, by a tenth and more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
MEASURED, KERNELS = RESULTS / "h200-2026-11-26", RESULTS / "h200-2026-11-27" / "kernels.json"
WARP = 32
CHAINED = "loss_terms"
ISSUED = 4  # instructions of warps that a multiprocessor starts in one cycle
# Tiles of cuBLAS on sm_90, and in how many parts it may divide the inner dimension; the fastest for a product is taken.
TILES = ((128, 256), (256, 128), (192, 192), (256, 144), (256, 112), (192, 128), (128, 192), (128, 160), (128, 128),
         (64, 128))  # fmt: skip
DIVISIONS, LEAST_INNER = (1, 2, 3, 4, 6, 8), 256


@dataclass(frozen=True)
class Device:
    name: str
    bandwidth: float  # bytes a second, of a copy
    cache: float  # bytes of the second-level cache
    multiprocessors: int = 132
    cache_bandwidth: float = 5.5e12


CACHE_SHARE = 0.75  # of the cache holds what the last kernels touched

# The H200 copied 4.28 TB/s. An H100 has the same multiprocessors and .70 of the memory's bandwidth.
H200 = Device("H200", 4.28e12, 60e6)
H100 = Device("H100", 4.28e12 * 3.35 / 4.8, 50e6)


@dataclass(frozen=True)
class ProductConstants:
    teraflops: float  # of an endless inner dimension in endless tiles
    edge: float  # cost of a tile's edges: it runs at 1 / (1 + edge (1 / rows + 1 / columns)) of that
    start: float  # inner dimension that takes as long as starting and ending a tile
    quantum: float  # share of a last, incomplete wave that is lost; 1: all of it
    bandwidth: float  # share of a copy's that operands and results reach
    norm: float
    launch: float  # microseconds


@dataclass(frozen=True)
class RowConstants:
    gigahertz: float  # cycles that start `ISSUED` instructions
    latency: float  # microseconds of a pass of the main loop while nothing else runs
    launch: float  # microseconds
    chain: float  # microseconds of `loss_terms` beside that: it waits for loads that need each other
    bandwidth: float  # of reading, relative to that of a copy
    norm: float


@dataclass(frozen=True)
class TorchConstants:
    """Terabytes a second."""

    copy: float  # kernels that read and write vectors: gather, copy, fill
    scattered: float  # kernels that do not: adding rows, multiplying by a number on the device


@dataclass(frozen=True)
class PauseConstants:
    """When no kernel runs, though the host is fast enough."""

    gap: float  # microseconds between two kernels
    call: float  # milliseconds of a call, at its begin and end

    def seconds(self, kernels: int) -> float:
        return 1e-3 * self.call + 1e-6 * self.gap * kernels


@dataclass(frozen=True)
class Constants:
    product: ProductConstants
    row: RowConstants
    torch: TorchConstants
    pause: PauseConstants


def product_time(
    constants: ProductConstants, device: Device, m: int, n: int, k: int, out_bytes: int, accumulate: bool = False,
    batch: int = 1, element: int = 2,
) -> float:  # fmt: skip
    """Seconds of `batch` products [m, k] x [k, n]."""
    operands, result = element * (m * k + n * k), out_bytes * m * n * (2 if accumulate else 1)
    fastest = math.inf
    for parts in DIVISIONS:
        if parts > 1 and k < parts * LEAST_INNER:
            break
        partial = 8 * parts * m * n if parts > 1 else 0  # float32, written and read
        moving = batch * (operands + result + partial) / (device.bandwidth * constants.bandwidth)
        computing = _computing_time(constants, device, m, n, k / parts, batch * parts)
        launches = 1 if parts == 1 else 2
        fastest = min(fastest, together(constants.norm, computing, moving) + launches * constants.launch * 1e-6)
    return fastest


def _computing_time(constants: ProductConstants, device: Device, m: int, n: int, k: float, batch: int) -> float:
    rate = constants.teraflops * 1e12 / device.multiprocessors
    fastest = math.inf
    for rows, columns in TILES:
        exact = batch * math.ceil(m / rows) * math.ceil(n / columns) / device.multiprocessors
        waves = max(1.0, constants.quantum * math.ceil(exact) + (1 - constants.quantum) * exact)
        slower = 1 + constants.edge * (1 / rows + 1 / columns)
        fastest = min(fastest, waves * slower * 2 * rows * columns * (k + constants.start) / rate)
    return fastest


def row_time(
    constants: RowConstants,
    device: Device,
    programs: int,
    passes: float,  # of the main loop, a program
    code: object,  # a `roofline_sass.KernelCode`, or what has its fields
    memory_bytes: float,
    cache_bytes: float = 0.0,
    kernel: str = "",
) -> float:
    """Seconds of one launch of a row kernel. `kernel`: its name, which counts if it is `CHAINED`."""
    loop, outside, warps, resident = (getattr(code, name) for name in ("loop", "outside", "warps", "resident"))
    instructions = programs * warps * (outside + passes * loop)
    issuing = instructions / (ISSUED * device.multiprocessors * constants.gigahertz * 1e9)
    moving = memory_bytes / (device.bandwidth * constants.bandwidth) + cache_bytes / device.cache_bandwidth
    waves = math.ceil(programs / (device.multiprocessors * resident))
    waiting = waves * passes * constants.latency * 1e-6
    fixed = constants.launch + (constants.chain if kernel == CHAINED else 0)
    return together(constants.norm, issuing, moving, waiting) + fixed * 1e-6


def torch_time(constants: TorchConstants, device: Device, moved: float, scattered: bool) -> float:
    """Seconds of an operation of torch that is no product."""
    scale = device.bandwidth / H200.bandwidth
    return moved / ((constants.scattered if scattered else constants.copy * scale) * 1e12)


def together(norm: float, *times: float) -> float:
    """The time of parts that overlap in part."""
    return sum(time**norm for time in times if time > 0) ** (1 / norm)


# What was measured, and how far the formulas are from it.


@dataclass(frozen=True)
class Fit:
    constants: Constants
    residuals: dict[str, dict[str, float]]  # by group and measurement: model / measured - 1

    def rms(self, group: str) -> float:
        return float(np.sqrt(np.mean(np.square(list(self.residuals[group].values())))))

    def largest(self, group: str) -> float:
        return max(self.residuals[group].values(), key=abs)


@cache
def fitted() -> Fit:
    product, product_residuals = _fit(_product_errors, ProductConstants(850, 3, 96, 0.3, 0.9, 1.4, 2))
    row, row_residuals = _fit(_row_errors, RowConstants(1.7, 0.7, 1, 4, 1, 1.4))
    torch, torch_residuals = _fit(_torch_errors, TorchConstants(2.7, 1.6))
    pause, pause_residuals = _fit(_pause_errors, PauseConstants(2, 0.5))
    residuals = {
        "products": product_residuals, "row kernels": row_residuals, "torch kernels": torch_residuals,
        "pauses": pause_residuals,
    }  # fmt: skip
    return Fit(Constants(product, row, torch, pause), residuals)


def _product_errors(constants: ProductConstants) -> dict[str, float]:
    def model(m: int, n: int, k: int, out: int, accumulate: bool = False) -> float:
        return product_time(constants, H200, m, n, k, out, accumulate)

    errors = {}
    layers, anchors, tokens, width = 28, 6912, 13824, 3584  # every time is scaled to this problem
    for rows, times in read(MEASURED / "gemm-and-trials.json")["gemm"]:
        measured = [milliseconds * 1e-3 * rows / (layers * anchors) for milliseconds in times]
        for out, (s, row, token) in ((4, measured[:3]), (2, measured[4:])):
            kind = "fp32" if out == 4 else "bf16"
            errors[f"{rows} rows, similarities, {kind}"] = model(rows, tokens, width, out) / s
            errors[f"{rows} rows, row gradient, {kind}"] = model(rows, width, tokens, out) / row
            errors[f"{rows} rows, token gradient, {kind}"] = model(tokens, width, rows, out) / token
        errors[f"{rows} rows, token gradient, added"] = model(tokens, width, rows, 4, accumulate=True) / measured[3]
    for name, (one, three) in measured_floors().items():
        shape = workload_shape(name)
        errors[f"{name}, one product"] = floor_time(constants, H200, *shape, products=1) / one
        errors[f"{name}, three products"] = floor_time(constants, H200, *shape, products=3) / three
    errors.update(_shares_of_runs(constants))
    return errors


def _shares_of_runs(constants: ProductConstants) -> dict[str, float]:
    """Products of the second day, each relative to the others of its run."""
    ratios: dict[str, dict[str, float]] = {}
    for product in read(KERNELS)["products"]:
        modelled = sum(
            launches * product_time(constants, H200, m, n, k, 4, bool(accumulate), batch)
            for launches, batch, m, n, k, accumulate in product["shapes"]
        )
        ratios.setdefault(product["run"], {})[product["name"]] = modelled / product["milliseconds"]
    errors = {}
    for run, of_run in ratios.items():
        mean = math.exp(np.mean(np.log(list(of_run.values()))))
        errors.update({f"{run}, {name}, 27 November": ratio / mean for name, ratio in of_run.items()})
    return errors


def floor_time(
    constants: ProductConstants, device: Device, layers: int, anchors: int, tokens: int, width: int, products: int
) -> float:
    """Seconds of the bare products of all layers, with 16-bit results as in `gasp-fast bench`."""
    shapes = [(anchors, tokens, width), (anchors, width, tokens), (tokens, width, anchors)][:products]
    return layers * sum(product_time(constants, device, *shape, out_bytes=2) for shape in shapes)


def workload_shape(name: str) -> tuple[int, int, int, int]:
    """(L, A, N, D) of a workload in the measurements."""
    record = next(record for record in read(MEASURED / "loss-and-peers.json")["bench"] if record["name"] == name)
    return record["L"], record["A"], record["N"], record["D"]


def measured_floors() -> dict[str, tuple[float, float]]:
    """Seconds of one product and of three, the mean over the runs of each workload."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for record in read(MEASURED / "loss-and-peers.json")["bench"]:
        pair = record["one_product_ms"]["p50"] * 1e-3, record["three_products_ms"]["p50"] * 1e-3
        runs.setdefault(record["name"], []).append(pair)
    return {name: tuple(np.mean(both, axis=0).tolist()) for name, both in runs.items()}


@dataclass(frozen=True)
class RecordedCode:
    """Instructions of a kernel of an earlier commit, from `row-kernels.json`."""

    loop: int
    outside: int
    warps: int
    resident: int
    rows: int = 0
    columns: int = 0
    passes: int = 1  # over the numbers it reads


def recorded_codes() -> dict[str, RecordedCode]:
    names = [field.name for field in fields(RecordedCode)]
    return {
        name: RecordedCode(**{key: value for key, value in code.items() if key in names})
        for name, code in read(MEASURED / "row-kernels.json")["codes"].items()
    }


def _row_errors(constants: RowConstants) -> dict[str, float]:
    codes, record = recorded_codes(), read(MEASURED / "row-kernels.json")

    def model(run: dict, kernel: dict) -> float:
        code, programs, numbers = codes[kernel["code"]], run["programs"], run["numbers"]
        passes = code.passes * math.ceil(numbers / programs / (code.rows * code.columns))
        cached = min(1.0, CACHE_SHARE * H200.cache / kernel["since_bytes"]) if "since_bytes" in kernel else 0.0
        from_cache = numbers * (kernel.get("cached_again", 0) + cached * 4)
        memory = numbers * (kernel["bytes_a_number"] - cached * 4)
        return row_time(constants, H200, programs, passes, code, memory, from_cache)

    errors = {}
    for run in record["measured"]:
        seconds = run["milliseconds"] * 1e-3 / run["launches"]
        errors[f"{run['kernel']}, {run['workload']}"] = model(run, run) / seconds
    for run in record["sums"]:
        seconds = run["milliseconds"] * 1e-3 / run["launches"]
        together = sum(model(run, kernel) for kernel in run["kernels"])
        errors[f"both trial kernels, {run['workload']}"] = together / seconds
    for run in read(KERNELS)["row_kernels"]:
        modelled = sum(launch["count"] * _recorded_time(constants, run["kernel"], launch) for launch in run["launches"])
        errors[f"{run['kernel']}, {run['workload']}, 27 November"] = modelled / (run["milliseconds"] * 1e-3)
    return errors


def _recorded_time(constants: RowConstants, kernel: str, launch: dict) -> float:
    code = RecordedCode(**launch["code"])
    moved = launch["memory_bytes"], launch["cache_bytes"]
    return row_time(constants, H200, launch["programs"], launch["passes"], code, *moved, kernel)


def _torch_errors(constants: TorchConstants) -> dict[str, float]:
    """Kernels of torch in the profile of each workload."""
    errors = {}
    profile = read(MEASURED / "loss-and-peers.json")["profile"]
    for name in ("w1", "w2", "w3"):
        kernels = profile[name]["kernels"]
        layers, anchors, tokens, width = workload_shape(name)

        def seconds(pattern: str, kernels: list = kernels) -> float:
            return next(k[1] for k in kernels if pattern in k[0]) * 1e-3

        def model(moved: float, scattered: bool) -> float:
            return torch_time(constants, H200, layers * moved * width, scattered)  # noqa: B023

        errors[f"gather, {name}"] = model(4 * anchors, False) / seconds("vectorized_gather")
        errors[f"add rows, {name}"] = model(12 * anchors, True) / seconds("indexFuncLargeIndex")
        errors[f"scale, {name}"] = model(4 * tokens, True) / seconds("elementwise_kernel<128, 4")
    return errors


def _pause_errors(constants: PauseConstants) -> dict[str, float]:
    return {
        f"{run['launches']} kernels, {run['workload']}, {number}": constants.seconds(run["launches"])
        / (run["milliseconds"] * 1e-3)
        for number, run in enumerate(read(KERNELS)["pauses"])
    }


@cache
def read(path: Path) -> dict:
    return json.loads(path.read_text())


def _fit(errors: Callable, start: object) -> tuple:
    """Constants that minimise the squares of `log(model / measured)`: Levenberg-Marquardt on their logarithms."""
    kind = type(start)
    names = list(errors(start))

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.log(list(errors(kind(*np.exp(logs))).values()))

    logs = np.log([getattr(start, field.name) for field in fields(start)])  # type: ignore[arg-type]
    best, damping, step = residuals(logs), 1e-2, 1e-4
    for _ in range(40):
        slopes = np.stack([(residuals(logs + step * unit) - best) / step for unit in np.eye(len(logs))], axis=1)
        move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(logs)), -slopes.T @ best)
        tried = residuals(logs + np.clip(move, -0.5, 0.5))
        if tried @ tried < best @ best:
            logs, best, damping = logs + np.clip(move, -0.5, 0.5), tried, damping / 3
        else:
            damping *= 4
    return kind(*map(float, np.exp(logs))), dict(zip(names, (np.exp(best) - 1).tolist(), strict=True))
