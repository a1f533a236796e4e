"""Turn tracks into questions and answers: a baseline that learns the geometry of GASP's matches from text.

Reads the sizes of the frames, their tracks, and the processor of the model. Writes into --out records in LLaVA-Video's
schema, which name frames in place of a video, and omitted-*.txt with the sequences that give no question. A stopped run
continues with the missing shards. Exit code 1 if no sequence gives a question, otherwise 0.

examples:
  gasp-fast make-vqa scenes --tracks tracks --model MODEL --out vqa
  gasp-fast make-vqa scenes --tracks tracks --model MODEL --out vqa --shard 0/4    # the first of four jobs
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gasp_fast.processes import check_workers, usable_cores

if TYPE_CHECKING:
    from gasp_fast.backbones import Backbone
    from gasp_fast.data.questions.scene_frames import Rectangle

HELP = "turn tracks into questions and answers (the fairness baseline)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenes", type=Path, metavar="DIR", help="the scenes of the tracks")
    parser.add_argument("--tracks", type=Path, required=True, metavar="DIR", help="the --out of gasp-fast tracks")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the model to train, or its hub name: positions are what it sees"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the records")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="questions per sequence")
    parser.add_argument(
        "--order",
        choices=("anchor_first", "chronological"),
        default="anchor_first",
        help="of a sequence's frames, as data.scenes.order (anchor_first)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the questions")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--shard", "--part", default="0/1", metavar="I/N", help="the work of job I of N, counted from 0 (0/1)"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.backbones import load_backbone
    from gasp_fast.data.annotations.parts import parse_part, shards_in_part
    from gasp_fast.data.annotations.read import AnnotationReader
    from gasp_fast.data.questions.from_tracks import View, VQAConfig, make_vqa, omitted_path

    check_workers(arguments.workers, "--workers")
    config = VQAConfig(turns=arguments.turns, order=arguments.order, seed=arguments.seed)
    part = parse_part(arguments.shard)
    settings = AnnotationReader(arguments.tracks).settings
    numbers = shards_in_part(settings.shards, part)
    view = View(arguments.model, partial(seen_of_frame, load_backbone(arguments.model)))
    shards = make_vqa(arguments.scenes, arguments.tracks, arguments.out, config, arguments.workers, part, view)
    columns = (TextColumn("writing questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for _ in progress.track(shards, total=len(numbers)):
            pass
    total = sum(len(settings.sequences_in_shard(number)) for number in numbers)
    lists = [omitted_path(arguments.out, number) for number in numbers]
    omitted = [line for path in lists if path.exists() for line in path.read_text().splitlines()]
    print(f"{arguments.out}: {total - len(omitted):,} records of {total:,} sequences")
    for line in omitted[:10]:
        print(f"omitted: {line}")
    if len(omitted) > 10:
        print(f"and {len(omitted) - 10:,} more, in {arguments.out / 'omitted-*.txt'}")
    return 1 if omitted and len(omitted) == total else 0


def seen_of_frame(backbone: Backbone, width: int, height: int) -> Rectangle:
    return backbone.frame_grid(width, height).rectangle
