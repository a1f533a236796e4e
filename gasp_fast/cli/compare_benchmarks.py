"""Compare several results of gasp-fast benchmark: the change against the base, and PCK beside benchmark means.

Reads folders of results, runs with a folder benchmarks/, or folders that hold such folders. Writes index.html,
comparison.json and the figures into --out: a heat map of the change for each model and benchmark, a table of PCK and
benchmark means, and the Pareto plot of both. PCK is that of the run's report, where the run has one.

examples:
  gasp-fast compare-benchmarks results --out comparison                   # all results in the folder
  gasp-fast compare-benchmarks runs/layers_10_18 runs/layers_all --names "10 to 18,all" --out table4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

HELP = "compare results of gasp-fast benchmark"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="DIR", help="results, runs, or folders of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the comparison")
    parser.add_argument(
        "--names", metavar="LIST", help="names of the models, separated by commas (default: of folders)"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.downstream.comparison import (
        ablation_rows,
        by_benchmark,
        find_results,
        gap_rows,
        read_models,
        write_comparison,
    )
    from gasp_fast.evaluation.tables import terminal_rows

    names = None if arguments.names is None else [name.strip() for name in arguments.names.split(",")]
    models = read_models(find_results(arguments.results), names)
    page = write_comparison(models, arguments.out)
    console = Console()
    console.print("Change against the base, percentage points:")
    console.print(terminal_rows(by_benchmark(gap_rows(models)), {}, ("",)))
    console.print("\nPCK, and the mean of each benchmark's categories:")
    console.print(terminal_rows(by_benchmark(ablation_rows(models)), {}, ("",)))
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)
    return 0
