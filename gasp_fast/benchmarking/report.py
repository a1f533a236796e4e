"""Reports the results of a benchmark as a table, as JSON and as a plot."""

from __future__ import annotations

import datetime
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gasp_fast.processes import processor_name, versions

from .measure import Result, Row


def print_table(result: Result, console: Console) -> None:
    """Errors, medians, ratios to the bare products, and memory of one workload."""
    three, one = statistics.median(result.three_products), statistics.median(result.one_product)
    table = Table(title=result.workload.describe(), title_justify="left", caption_justify="left")
    table.caption = (
        f"floor: one bare product of each layer {one:.2f} ms, three {three:.2f} ms "
        f"({result.workload.gemm_flops / three / 1e9:.2f} TFLOP/s). × = ratio to it, in the same rounds."
    )
    for row in result.rows:
        if row.note:
            table.caption += f"\nnot timed: {row.variant}: {row.note}"
    for title in ("variant", "solves", "error", "forward ms", "× one", "both ms", "× three", "extra MiB"):
        table.add_column(title, justify="left" if title in ("variant", "solves") else "right", no_wrap=True)
    for row in result.rows:
        if row.note:
            continue
        forward, both = statistics.median(row.forward), statistics.median(row.both)
        table.add_row(
            row.variant,
            row.solves,
            f"{row.error:.0e}",
            f"{forward:.2f}",
            f"{forward / one:.2f}",
            f"{both:.2f}",
            f"{both / three:.2f}",
            f"{row.peak_mib:.0f}",
        )
    console.print(table)


def as_json(results: list[Result], device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions("gasp-fast", "torch", "triton", "numpy"),
        "workloads": [_workload_json(result) for result in results],
    }


def machine(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def device_and_date(machine: str) -> str:
    """DEVICE-DATE, for the name of a file."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', machine.split(',')[0])}-{datetime.date.today()}"


def save(results: list[Result], device: torch.device, out: Path) -> list[Path]:
    """Write `DEVICE-DATE.json` and `DEVICE-DATE.png` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    name = device_and_date(machine(device))
    paths = [out / f"{name}.json", out / f"{name}.png"]
    paths[0].write_text(json.dumps(as_json(results, device), indent=1) + "\n")
    plot(results, device, paths[1])
    return paths


def plot(results: list[Result], device: torch.device, path: Path) -> None:
    """Bars of forward + backward as multiples of three bare products, a panel for each workload."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.variant for result in results for row in result.rows))
    colours = dict(zip(names, ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"], strict=False))
    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="tight")
    panels = figure.subplots(1, len(results), squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        three = statistics.median(result.three_products)
        rows = [row for row in result.rows if row.both]
        ratios = [statistics.median(row.both) / three for row in rows]
        places = range(len(rows))
        panel.barh(places, ratios, color=[colours[row.variant] for row in rows])
        for place, ratio in zip(places, ratios, strict=True):
            panel.text(ratio, place, f" {ratio:.2f}×", va="center", fontsize=8)
        panel.set_yticks(places, [row.variant for row in rows], fontsize=8)
        panel.invert_yaxis()
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_xlim(0, 1.25 * max([1.0, *ratios]))
        panel.set_title(result.workload.describe().replace(": ", "\n", 1), fontsize=8)
        panel.set_xlabel("forward + backward / three bare products", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"gasp_fast loss on {machine(device)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _workload_json(result: Result) -> dict[str, Any]:
    workload = result.workload
    three, one = statistics.median(result.three_products), statistics.median(result.one_product)
    return {
        "name": workload.name,
        "L": workload.layers,
        "A": workload.anchors,
        "N": workload.tokens,
        "D": workload.width,
        "F": workload.frames,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "one_product_ms": _quantiles(result.one_product),
        "three_products_ms": _quantiles(result.three_products),
        "floor_tflops": workload.gemm_flops / three / 1e9,
        "variants": [_row_json(row, one, three) for row in result.rows],
    }


def _row_json(row: Row, one: float, three: float) -> dict[str, Any]:
    record: dict[str, Any] = {"name": row.variant, "solves": row.solves, "note": row.note, "error": row.error}
    if not row.note:
        forward, both = statistics.median(row.forward), statistics.median(row.both)
        record |= {
            "forward_ms": _quantiles(row.forward),
            "both_ms": _quantiles(row.both),
            "backward_ms": both - forward,  # less a forward pass without gradient
            "forward_ratio": forward / one,
            "both_ratio": both / three,
            "extra_mib": row.peak_mib,
        }
    return record


def _quantiles(samples: list[float]) -> dict[str, float]:
    return dict(zip(("p20", "p50", "p80"), np.quantile(samples, (0.2, 0.5, 0.8)).tolist(), strict=True))
