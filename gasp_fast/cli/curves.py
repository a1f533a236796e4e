"""Draw the training curves of one run or of several runs over each other.

Losses, PCK on training batches and on held-out scenes, learning rate and the norm of the gradient, each run in its own
colour. Reads each run's log.jsonl, also while it trains. Writes one picture; its ending says the format: .png, .svg or
.pdf. gasp-fast compare draws the same curves into the page of reports that runs have.

examples:
  gasp-fast curves runs/corr runs/full --out curves.png
  gasp-fast curves runs/corr runs/full --names "correspondence only,full" --out curves.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "draw training curves of several runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--names", metavar="LIST", help="names of the runs, separated by commas (default: folders)")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.drawing import save_figure
    from gasp_fast.run_folder import LOG
    from gasp_fast.training.curves import draw_curves, read_run

    logs = [read_run(folder) for folder in arguments.runs]
    for folder, log in zip(arguments.runs, logs, strict=True):
        if not log.records:
            raise ValueError(f"{folder / LOG} has no steps; give folders of gasp_fast.train that have logged some")
    names = _names(arguments.names, arguments.runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"curves: {save_figure(draw_curves(dict(zip(names, logs, strict=True))), arguments.out)}")
    return 0


def _names(given: str | None, runs: list[Path]) -> list[str]:
    names = [run.resolve().name for run in runs] if given is None else [name.strip() for name in given.split(",")]
    if len(names) != len(runs):
        raise ValueError(f"--names gives {len(names)} names for {len(runs)} runs; give one for each")
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name ({', '.join(names)}); name them with --names")
    return names
