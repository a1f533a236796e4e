"""Measure how well each layer of a model finds points of one frame again in other frames of a video.

Reads a model (a folder or hub name, a run of gasp_fast.train with its heads, or a LoRA adapter) and scenes in any
format that gasp-fast scenes reads. Writes index.html, report.json and figures into --out (default for a run:
RUN/report). In index.html, point at a token of a frame and see where each layer looks for it in later frames. Run again
with the same options, a stopped evaluation resumes; with another --radius, the predictions are scored again. Scenes and
sequences that cannot be read are left out and named. docs/evaluating.md defines the metrics.

examples:
  gasp-fast evaluate --model runs/full --scenes held-out                          # into runs/full/report
  gasp-fast evaluate --model Qwen/Qwen2.5-VL-7B-Instruct --scenes scenes --out before --features qk,hidden
  gasp-fast evaluate --model runs/full --scenes scenes --held-out 0.05 --out report     # only what training left out
  gasp-fast evaluate --model runs/full --scenes scenes --features qk --direction both --confidence attention
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from gasp_fast.evaluation.evaluate import EvaluationConfig

HELP = "measure point correspondence of a model, layer by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="model folder, hub name, run, or adapter")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="model that a run's or adapter's weights belong to (default: as its files say, without a download)",
    )
    parser.add_argument("--scenes", type=Path, required=True, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default for a run: RUN/report)")
    parser.add_argument("--sequences", type=int, default=200, metavar="N", help="number of sequences")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of a sequence")
    parser.add_argument("--grid", type=int, default=8, metavar="N", help="query points along each axis")
    parser.add_argument(
        "--max-gap", type=int, default=24, metavar="N", help="largest number of frames between first and later frames"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="X",
        help="only the scenes that training with this share holds out; 0: all",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sequences")
    parser.add_argument(
        "--features",
        default="auto",
        metavar="LIST",
        help="of head, qk, hidden, separated by commas; the first leads the report; auto: all that the model has. "
        "head on a model without heads: the initial heads of training",
    )
    parser.add_argument(
        "--rope", choices=("before", "after"), default="before", help="qk before or after the rotary embedding"
    )
    parser.add_argument(
        "--direction",
        choices=("forward", "causal", "both"),
        default="forward",
        help="forward: points of the first frame are looked for in later frames; causal: points of later frames in the "
        "first, as attention does; both side by side",
    )
    parser.add_argument(
        "--confidence",
        choices=("cosine", "attention"),
        default="cosine",
        help="of a prediction: its matching probability; attention: that of qk by a softmax of q.k / sqrt(d)",
    )
    parser.add_argument(
        "--radius", type=float, default=2.0, metavar="X", help="patches within which a prediction is correct"
    )
    parser.add_argument("--temperature", type=float, default=0.07, metavar="X", help="of the matching probabilities")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="sequences in one forward pass")
    parser.add_argument(
        "--pictures", type=int, default=3, metavar="N", help="sequences to point at in the page; 0: none"
    )
    parser.add_argument(
        "--frame-pixels",
        type=int,
        metavar="N",
        help="most pixels of a frame (Qwen; default: the run's model.frame_pixels, or else the processor's limit)",
    )
    parser.add_argument(
        "--frames-as",
        choices=("images", "video_doubled"),
        help="how Qwen gets frames, as model.frames_as (default: as the run does, else images)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default: bfloat16 on cuda, else float32)",
    )
    parser.add_argument("--fresh", action="store_true", help="start again instead of resuming what --out holds")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from gasp_fast.evaluation.dataset import EvaluationSet
    from gasp_fast.evaluation.evaluate import evaluate
    from gasp_fast.evaluation.evaluated_model import load_evaluated_model
    from gasp_fast.evaluation.pointing import pointing_data
    from gasp_fast.evaluation.report import token_grids, warnings_of, write_report
    from gasp_fast.evaluation.tables import terminal_table
    from gasp_fast.run_folder import FIGURE, LOG, REPORT, result_folder, run_of

    out = arguments.out or result_folder(arguments.model, REPORT)
    console = Console()
    config = _config(arguments)
    dataset = EvaluationSet(arguments.scenes, config.data)  # before the model, which takes longer to load
    evaluated = load_evaluated_model(
        arguments.model,
        device=arguments.device,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        frame_pixels=arguments.frame_pixels,
        frames_as=arguments.frames_as,
        initial_heads="head" in config.features,
        base=arguments.base,
    )
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("sequences"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=len(dataset))

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        evaluation = evaluate(evaluated, dataset, config, out, fresh=arguments.fresh, progress=show)
    pointing = pointing_data(evaluated, dataset, config, evaluation, arguments.pictures)
    report, related = evaluation.report, []
    if (run := run_of(arguments.model)) is not None:
        report["run"] = os.path.relpath(run.resolve(), out.resolve())
        related = [("training curves of the run", run / FIGURE), ("log of the run", run / LOG)]
    page = write_report(report, out, pointing, related)
    console.print(terminal_table({evaluated.name: evaluation.report}))
    console.print(token_grids(evaluation.report), highlight=False)
    if pointing is None and arguments.pictures:
        reason = "it shows the forward direction; take --direction both"
        if config.direction != "causal":
            reason = "the frames have too many tokens for it; take a lower --frame-pixels or --pictures"
        console.print(f"The page has no frames to point at: {reason}.")
    if evaluated.heads_origin == "initial":
        console.print("The heads are untrained: initialised from W_Q, as at the start of training.")
    if untracked := evaluation.report["sequences_without_tracks"]:
        console.print(f"{untracked} sequences without a point that is visible in two frames are left out.")
    for warning in warnings_of(evaluation.report):
        console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


def _config(arguments: argparse.Namespace) -> EvaluationConfig:
    from gasp_fast.evaluation.dataset import EvaluationSetConfig
    from gasp_fast.evaluation.evaluate import EvaluationConfig

    if arguments.pictures < 0:
        raise ValueError(f"--pictures {arguments.pictures}: give the number of sequences to point at, or 0")
    if arguments.frame_pixels is not None and arguments.frame_pixels < 1:
        raise ValueError(f"--frame-pixels {arguments.frame_pixels}: at least 1")
    data = EvaluationSetConfig(
        sequences=arguments.sequences,
        frames=arguments.frames,
        grid=arguments.grid,
        max_gap=arguments.max_gap,
        held_out=arguments.held_out,
        seed=arguments.seed,
    )
    names = () if arguments.features == "auto" else tuple(name.strip() for name in arguments.features.split(","))
    return EvaluationConfig(
        data=data,
        features=names,
        rope=arguments.rope,
        direction=arguments.direction,
        confidence=arguments.confidence,
        radius=arguments.radius,
        temperature=arguments.temperature,
        batch=arguments.batch,
    )
