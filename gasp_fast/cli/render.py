"""`gasp-fast render`: synthetic scenes with exact geometry, and questions about them, from a seed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

HELP = "render synthetic rooms with exact depth and poses, and write questions and answers about them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that receives one folder per scene"
    )
    parser.add_argument("--scenes", type=int, default=50, metavar="N", help="how many scenes (default: 50)")
    parser.add_argument("--frames", type=int, default=32, metavar="N", help="frames of each scene (default: 32)")
    parser.add_argument(
        "--size", type=int, default=224, metavar="PX", help="width and height of a frame (default: 224)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first scene (default: 0)")
    parser.add_argument("--no-qa", action="store_true", help="leave out the clips and questions in DIR/qa")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: all cores)"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.data.synthetic import SyntheticConfig, render_scenes
    from gasp_fast.data.synthetic_qa import write_qa

    config = SyntheticConfig(frames=arguments.frames, width=arguments.size, height=arguments.size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        rendering = render_scenes(arguments.out, arguments.scenes, arguments.seed, config, arguments.workers)
        folders = list(progress.track(rendering, arguments.scenes, description="rendering scenes"))
        if not arguments.no_qa:
            asking = write_qa(folders, arguments.out / "qa", arguments.workers)
            list(progress.track(asking, arguments.scenes, description="asking questions"))
    print(f"{arguments.scenes} scenes of {arguments.frames} frames in {arguments.out}")
    return 0
