"""Compare several reports of gasp-fast evaluate in one page, table and figure.

Typically the model before training, after training with the correspondence loss only, and after the full recipe, all
evaluated on the same sequences. Reads report folders, or runs with a report; writes index.html and the figures into
--out. In index.html, point at a token of a frame and see where each model looks for it in later frames; reports of runs
also show their training curves over each other. Each report's difference from the first is given with a 95 % interval,
from a paired bootstrap over the sequences that both have.

examples:
  gasp-fast compare before after --out comparison
  gasp-fast compare before corr full --names "before,correspondence only,full" --out comparison
  gasp-fast compare runs/corr runs/full --out comparison          # the reports in two runs, with training curves
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

HELP = "compare reports of gasp-fast evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports", type=Path, nargs="+", metavar="REPORT", help="folders (or report.json), or runs, to compare"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the comparison")
    parser.add_argument("--names", metavar="LIST", help="names of the reports, separated by commas (default: models)")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.evaluation.paired import difference_rows
    from gasp_fast.evaluation.report import find_report, read_report, write_comparison
    from gasp_fast.evaluation.tables import terminal_rows, terminal_table
    from gasp_fast.training.curves import draw_curves, read_run

    console = Console()
    files = [find_report(path) for path in arguments.reports]
    contents = [read_report(file, whole=True) for file in files]
    names = _names(arguments.names, [report["model"] for report in contents], [file.parent for file in files])
    reports = dict(zip(names, contents, strict=True))
    folders = [
        file.parent / report["run"] if "run" in report else None for file, report in zip(files, contents, strict=True)
    ]
    logs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True) if folder is not None}
    logs = {name: log for name, log in logs.items() if log.records}
    comparison = write_comparison(
        reports,
        arguments.out,
        sources=dict(zip(names, files, strict=True)),
        curves=draw_curves(logs) if logs else None,
    )
    console.print(terminal_table(reports))
    if comparison.differences:
        console.print(terminal_rows(difference_rows(comparison.differences, reports), {}, ("difference", "metric")))
    for warning in comparison.warnings:
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)
    console.print(f"comparison: {comparison.page}", highlight=False, soft_wrap=True)
    return 0


def _names(given: str | None, models: list[str], folders: list[Path]) -> list[str]:
    """The given names; else the models' names, or, if those repeat, the names of the reports' folders."""
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(models):
            raise ValueError(f"--names gives {len(names)} names for {len(models)} reports; give one for each")
    elif len(set(models)) == len(models):
        names = models
    else:
        names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"two reports have the same name ({', '.join(names)}); name them with --names")
    return names
