"""Measure an exported model and its base on the paper's benchmarks, through lmms-eval in an environment of its own.

Reads two model folders (what gasp-fast export writes, and its base) and a folder of data, in which each dataset of the
hub is OWNER/NAME; nothing is downloaded. Writes results.json, tables.md and index.html into --out: for each benchmark
both scores, by category too, their difference and its 95 % interval. Each task is answered once: started again with the
same options, a stopped run continues with the next task. docs/benchmarks.md has the suites, the data and the scores.

examples:
  gasp-fast benchmark --model exports/gasp --base Qwen2.5-VL-7B-Instruct --suite paper --out results
  gasp-fast benchmark --model exports/gasp --suite spatial,videomme --data /data/benchmarks --out results
  gasp-fast benchmark --model exports/gasp --suite vsibench --limit 20 --out trial
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

HELP = "measure a model and its base on the paper's benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported model")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="model to compare it with (default: the base that the export names, if it is a folder here; else none)",
    )
    parser.add_argument(
        "--suite",
        required=True,
        metavar="NAME",
        help="spatial, general, paper, easi8, correspondence, bias, or benchmarks or their tasks, separated by commas",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for answers, results and tables")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of data (default: HF_HOME, or ~/.cache/huggingface)"
    )
    parser.add_argument(
        "--environment",
        metavar="DIR",
        help="lmms-eval's virtual environment (default: the variable GASP_FAST_LMMS_EVAL, or .venv-eval)",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="most frames of a video (default: 32)")
    parser.add_argument(
        "--pixels",
        type=int,
        metavar="N",
        help="most pixels of a frame or image, for Qwen (default: 451584 of frames, 1605632 of images)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, for a trial")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.backbones.base_model import usable_device
    from gasp_fast.downstream import answers, data, environment, results, suites, tables

    wanted = suites.chosen(arguments.suite)
    device = str(usable_device(arguments.device))
    settings = answers.Settings(arguments.frames, arguments.pixels, arguments.limit, device)
    roles = answers.subjects(arguments.model, arguments.base)
    folder = arguments.data or data.default_folder()
    if not folder.is_dir():
        raise OSError(f"--data {folder}: no such folder; docs/benchmarks.md says what it holds")
    lacking = {one.key: line for one in wanted if (line := data.missing(folder, one))}
    present = [one for one in wanted if one.key not in lacking]
    for line in lacking.values():
        print(line, file=sys.stderr)
    if not present:
        raise OSError(f"no data for --suite {arguments.suite} in {folder}")
    python = environment.find_python(arguments.environment)
    console = Console()
    for one in present:
        seen = tables.seen(settings.of(one, roles["model"].kind))
        console.print(f"{one.key}: {', '.join(one.tasks)}; {seen}", highlight=False, soft_wrap=True)
    answers.run_answers(list(roles.values()), present, settings, python, folder, arguments.out)
    found = results.collect(roles, present, settings, list(lacking.values()), python, folder, arguments.out)
    page = tables.write_tables(found, arguments.out)
    console.print(tables.terminal_table(found))
    console.print(f"tables: {page}", highlight=False, soft_wrap=True)
    return 0
