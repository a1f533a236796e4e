"""Render synthetic rooms with exact depth and poses, and write questions about them.

The result depends on the seed and the options. Writes DIR/scene-*/ (colour, depth and poses in the rgbd format, which
every other command reads) and DIR/qa/ (a clip of each scene, questions and answers in LLaVA-Video's schema). Complete
scenes with the same options are kept, others are rendered.

examples:
  gasp-fast render --out scenes --scenes 8
  gasp-fast render --out held-out --scenes 10 --seed 1000     # other seeds, other rooms
  gasp-fast render --out small --scenes 2 --frames 8 --size 112 --no-qa
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gasp_fast.processes import check_workers, usable_cores

HELP = "render synthetic rooms with exact depth and poses, and questions about them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="output folder, with one folder per scene"
    )
    parser.add_argument("--scenes", type=int, default=50, metavar="N", help="number of scenes")
    parser.add_argument("--frames", type=int, default=32, metavar="N", help="frames per scene")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="width and height of a frame")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the first scene; the following scenes have the following seeds",
    )
    parser.add_argument("--no-qa", action="store_true", help="do not write the clips and questions in DIR/qa")
    parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N", help="threads (default: all cores)")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.data.synthetic.questions import write_qa
    from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes

    check_workers(arguments.workers, "--workers")
    config = SyntheticConfig(frames=arguments.frames, width=arguments.size, height=arguments.size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        rendering = render_scenes(arguments.out, arguments.scenes, arguments.seed, config, arguments.workers)
        folders = list(progress.track(rendering, arguments.scenes, description="rendering scenes"))
        if not arguments.no_qa:
            clips = write_qa(folders, arguments.out / "qa", arguments.workers)
            list(progress.track(clips, arguments.scenes, description="writing questions"))
    print(f"{arguments.scenes} scenes of {arguments.frames} frames in {arguments.out}")
    return 0
