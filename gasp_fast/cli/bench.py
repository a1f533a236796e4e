"""Time the loss against three bare matrix products, dense PyTorch and other libraries, in one interleaved run.

Every variant is first compared with float64 on a smaller problem; a wrong one is not timed. Prints a table; with --out,
writes DEVICE-DATE.json and a plot into that folder.

examples:
  gasp-fast bench                                    # the standard set of this machine
  gasp-fast bench --workload w1 w3 --rounds 50       # two of them, more rounds
  gasp-fast bench --only ours --out results          # one variant, with JSON and plot
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "time the loss against bare matrix products and other libraries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gasp_fast.benchmarking.variants import VARIANTS
    from gasp_fast.benchmarking.workloads import WORKLOADS

    parser.add_argument(
        "--workload",
        nargs="+",
        choices=list(WORKLOADS),
        metavar="NAME",
        help=f"any of {', '.join(WORKLOADS)} (default: the standard set of the device)",
    )
    variants = [variant.name for variant in VARIANTS]
    parser.add_argument(
        "--only", nargs="+", choices=variants, metavar="NAME", help=f"time only these: {', '.join(variants)}"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="interleaved rounds")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON and the plot")


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # peak memory is measured with the profiler, which prints
    import torch
    from rich.console import Console

    from gasp_fast.backbones.base_model import usable_device
    from gasp_fast.benchmarking import report
    from gasp_fast.benchmarking.measure import run_workload
    from gasp_fast.benchmarking.workloads import CPU_SET, GPU_SET, WORKLOADS

    if arguments.rounds < 1:
        raise ValueError(f"--rounds = {arguments.rounds}; at least 1 is needed")
    device = torch.device(usable_device(arguments.device))
    names = arguments.workload or (GPU_SET if device.type == "cuda" else CPU_SET)
    console = Console()
    console = console if console.width >= 100 else Console(width=100)
    results = []
    console.print(f"{report.machine(device)}, torch {torch.__version__}")
    for name in names:
        with console.status(name) as status:
            results.append(run_workload(WORKLOADS[name], device, arguments.rounds, arguments.only, status.update))
        report.print_table(results[-1], console)
    if arguments.out:
        for path in report.save(results, device, arguments.out):
            console.print(f"wrote {path}")
    return 0
