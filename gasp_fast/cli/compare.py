"""Compare several reports of gasp-fast evaluate in one table and one figure.

Typically the model before training, after training with the correspondence loss only, and after the full recipe, all
evaluated on the same sequences. Reads report folders; writes index.html and the figures into --out. Each report's
difference from the first is given with a 95 % interval, from a paired bootstrap over the sequences that both have.

examples:
  gasp-fast compare before after --out comparison
  gasp-fast compare before corr full --names "before,correspondence only,full" --out comparison
  gasp-fast compare before full --out comparison --scenes scenes      # with pictures of the predictions
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

HELP = "compare reports of gasp-fast evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="folders (or report.json) to compare")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the comparison")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="the scenes of the reports, to draw predictions")
    parser.add_argument("--names", metavar="LIST", help="names of the reports, separated by commas (default: models)")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.evaluation.paired import difference_rows
    from gasp_fast.evaluation.report import read_report, write_comparison
    from gasp_fast.evaluation.tables import terminal_rows, terminal_table

    console = Console()
    contents = [read_report(path, whole=True) for path in arguments.reports]
    folders = [path.parent if path.is_file() else path for path in arguments.reports]
    names = _names(arguments.names, [report["model"] for report in contents], folders)
    reports = dict(zip(names, contents, strict=True))
    pictures = []
    if arguments.scenes is not None:
        from gasp_fast.evaluation.gallery import draw_comparison

        outs = dict(zip(names, folders, strict=True))
        pictures = draw_comparison(outs, arguments.scenes, arguments.out / "pictures", 3)
    comparison = write_comparison(reports, arguments.out, pictures)
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
