"""Several reports of gasp-fast evaluate in one figure, on one scale.

Typically the model before training, after correspondence-only, and after the full recipe, asked the same questions.
Reads report folders; writes into --out index.html and the figures.

examples:
  gasp-fast compare before after --out comparison
  gasp-fast compare before corr full --names "before,correspondence only,full" --out comparison
  gasp-fast compare before full --out comparison --scenes scenes --model Qwen/Qwen2.5-VL-7B-Instruct
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from .evaluate import as_table

HELP = "several of these reports in one figure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="folders (or report.json) to compare")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that receives the comparison")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="the scenes asked about: draws the answers as well")
    parser.add_argument("--model", metavar="DIR", help="any of the models, for the tokens of a frame; with --scenes")
    parser.add_argument("--names", metavar="LIST", help="what to call them, separated by commas (default: the models)")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.evaluation.report import read_report, table_rows, write_comparison

    console = Console()
    found = [read_report(path) for path in arguments.reports]
    reports = dict(zip(_names(arguments, [report["model"] for report in found]), found, strict=True))
    pictures = _pictures(arguments, dict(zip(reports, arguments.reports, strict=True)))
    page, warnings = write_comparison(reports, arguments.out, pictures)
    console.print(as_table(table_rows(reports)))
    for warning in warnings:
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)
    return 0


def _pictures(arguments: argparse.Namespace, folders: dict[str, Path]) -> list[tuple[str, Path]]:
    if (arguments.scenes is None) != (arguments.model is None):
        raise ValueError("--scenes and --model belong together: frames and their tokens; give both, or neither")
    if arguments.scenes is None:
        return []
    from gasp_fast.backbones import load_backbone
    from gasp_fast.evaluation.showing import draw_comparison

    folders = {name: path.parent if path.is_file() else path for name, path in folders.items()}
    return draw_comparison(folders, arguments.scenes, load_backbone(arguments.model), arguments.out / "pictures", 3)


def _names(arguments: argparse.Namespace, models: list[str]) -> list[str]:
    """As asked; else the models' names; where those repeat, the names of the reports' folders."""
    if arguments.names is not None:
        names = [name.strip() for name in arguments.names.split(",")]
        if len(names) != len(models):
            raise ValueError(f"--names gives {len(names)} names for {len(models)} reports; give one each")
    else:
        folders = [path.parent if path.is_file() else path for path in map(Path.resolve, arguments.reports)]
        names = models if len(set(models)) == len(models) else [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"two reports would be called alike ({', '.join(names)}); tell them apart with --names")
    return names
