"""Measure the depth, points and camera poses that a G²VLM predicts for scenes where they are known.

Reads a model (a run of gasp_fast.train with objective: g2vlm, one of its checkpoints, or the folder of a saved model)
and scenes in any format that gasp-fast scenes reads. Writes index.html, report.json, pictures and point clouds (PLY)
into --out (default for a run: RUN/report). Beside the model's numbers are those of a constant depth with cameras that
do not move. Run again with the same options, a stopped evaluation resumes. Scenes and sequences that cannot be read are
left out and named. docs/g2vlm.md defines the metrics.

examples:
  gasp-fast geometry --model runs/g2vlm/tiny --scenes runs/g2vlm/scenes --held-out 0.1    # into runs/g2vlm/tiny/report
  gasp-fast geometry --model G2VLM --scenes scenes --out report --frames 8 --stride 4 --side 518 --aspect 1.5
  gasp-fast geometry --model G2VLM --scenes rooms --out depth --frames 1 --max-depth 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

HELP = "measure depth, points and camera poses of a G²VLM on scenes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--scenes", type=Path, required=True, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default for a run: RUN/report)")
    parser.add_argument(
        "--sequences", type=int, default=100, metavar="N", help="most sequences, spread evenly over the scenes"
    )
    parser.add_argument("--frames", type=int, default=4, metavar="N", help="frames of a sequence; 1: depth and points")
    parser.add_argument("--stride", type=int, default=4, metavar="N", help="frames of the scene from one to the next")
    add_side_argument(parser)
    parser.add_argument(
        "--aspect", type=float, default=1.0, metavar="X", help="width / height to which frames are cropped"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="X",
        help="only the scenes that training with this share holds out; 0: all",
    )
    parser.add_argument(
        "--max-depth",
        type=float,
        metavar="X",
        help="points beyond it, in the scenes' unit, do not count (default: all)",
    )
    parser.add_argument(
        "--points", type=int, default=4096, metavar="N", help="points of a sequence whose nearest ones are searched"
    )
    parser.add_argument(
        "--reach", type=float, default=0.1, metavar="X", help="ICP pairs no points farther apart, in the scenes' unit"
    )
    parser.add_argument("--pictures", type=int, default=3, metavar="N", help="sequences that are drawn; 0: none")
    parser.add_argument("--fresh", action="store_true", help="start again instead of resuming what --out holds")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="run, checkpoint, or folder of a saved model")
    parser.add_argument(
        "--base", metavar="MODEL", help="Qwen2-VL of a run (default: as its config.yaml says, without a download)"
    )
    parser.add_argument(
        "--encoder", metavar="MODEL", help="DINOv2 of a run (default: as its config.yaml says, without a download)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")


def add_side_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side",
        type=int,
        metavar="N",
        help="frames get as many pixels as a square of this side (default: as the run was trained, else 518)",
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.data.scenes.library import find_scenes
    from gasp_fast.g2vlm.evaluate import GeometryEvaluationConfig, GeometrySequences, evaluate_geometry
    from gasp_fast.g2vlm.inference import SIDE
    from gasp_fast.g2vlm.report import (
        draw_sequences,
        report_content,
        terminal_table,
        warnings_of,
        what_was_evaluated,
        write_report,
    )
    from gasp_fast.g2vlm.saved import load_geometry_model
    from gasp_fast.progress import Steps
    from gasp_fast.run_folder import REPORT, result_folder
    from gasp_fast.training.distributed import quiet_libraries

    quiet_libraries()
    console = Console()
    if arguments.pictures < 0:
        raise ValueError(f"--pictures {arguments.pictures}: give the number of sequences to draw, or 0")
    options = ("sequences", "frames", "stride", "aspect", "held_out", "max_depth", "points", "reach")
    config = {name: getattr(arguments, name) for name in options}
    side = SIDE if arguments.side is None else arguments.side
    GeometryEvaluationConfig(**config, side=side)  # this and the next lines: errors come before the model is loaded
    find_scenes(arguments.scenes)
    out = arguments.out or result_folder(arguments.model, REPORT)
    saved = load_geometry_model(
        arguments.model, device=arguments.device, base=arguments.base, encoder=arguments.encoder
    )
    if arguments.side is None and saved.side is not None:
        side = saved.side
    sequences = GeometrySequences(arguments.scenes, GeometryEvaluationConfig(**config, side=side))
    with Steps("evaluating", len(sequences), console) as steps:
        evaluation = evaluate_geometry(saved, sequences, out, fresh=arguments.fresh, progress=steps.to)
    report = report_content(saved, sequences, evaluation)
    page = write_report(report, draw_sequences(saved, sequences, evaluation, arguments.pictures, out), out)
    console.print(terminal_table(report))
    console.print(what_was_evaluated(report), highlight=False)
    for warning in warnings_of(report):
        console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0
