"""Ask a model which token of a later frame a point is on, layer by layer, and report how often it knows.

Reads a model (a folder or hub name, a run of gasp_fast.train with its heads, or a LoRA adapter) and scenes in any
format that gasp-fast scenes reads. Writes into --out (RUN/report, unless it is given) index.html to look at,
report.json, figures and pictures. An evaluation that was stopped goes on where it was. docs/evaluating.md says what
each figure means.

examples:
  gasp-fast evaluate --model runs/full --scenes held-out                          # into runs/full/report
  gasp-fast evaluate --model Qwen/Qwen2.5-VL-7B-Instruct --scenes scenes --out before --features qk,hidden
  gasp-fast evaluate --model runs/full --scenes scenes --held-out 0.05 --out report     # only what training left out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from gasp_fast.evaluation.evaluate import EvaluationConfig
    from gasp_fast.evaluation.sampling import QuestionConfig
    from gasp_fast.evaluation.subject import Subject

HELP = "report what a model knows of correspondence, layer by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="model folder, hub name, run, or adapter")
    parser.add_argument("--scenes", type=Path, required=True, metavar="DIR", help="a scene, or a folder of scenes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (of a run: RUN/report)")
    parser.add_argument("--sequences", type=int, default=200, metavar="N", help="sequences to ask about")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of a sequence")
    parser.add_argument("--grid", type=int, default=8, metavar="N", help="points along each axis")
    parser.add_argument(
        "--max-gap", type=int, default=24, metavar="N", help="most frames between the first and another"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="X",
        help="only the scenes that training leaves out with this share; 0: all",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the questions")
    parser.add_argument(
        "--features",
        default="auto",
        metavar="LIST",
        help="of head, qk, hidden, separated by commas; the first leads the report; auto: all that the model has. "
        "head on a model without heads: those that training would start from",
    )
    parser.add_argument(
        "--rope", choices=("before", "after"), default="before", help="qk before or after the rotary embedding"
    )
    parser.add_argument("--temperature", type=float, default=0.07, metavar="X", help="of the confidence")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="sequences at once")
    parser.add_argument("--pictures", type=int, default=3, metavar="N", help="sequences to picture; 0: none")
    parser.add_argument(
        "--frame-pixels", type=int, metavar="N", help="most pixels of a frame (Qwen; default: the processor's)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default: bfloat16 on cuda, else float32)",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever --out holds")


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.evaluation.evaluate import evaluate
    from gasp_fast.evaluation.report import table_rows, write_report
    from gasp_fast.evaluation.sampling import QuestionConfig, Questions
    from gasp_fast.evaluation.showing import draw_pictures
    from gasp_fast.run_folder import REPORT, place_for

    out = arguments.out or place_for(arguments.model, REPORT)
    console = Console()
    asked = QuestionConfig(
        sequences=arguments.sequences,
        frames=arguments.frames,
        grid=arguments.grid,
        max_gap=arguments.max_gap,
        held_out=arguments.held_out,
        seed=arguments.seed,
    )
    config = _config(arguments, asked)
    questions = Questions(arguments.scenes, asked)  # before the model: a wrong folder should not cost its loading
    subject = _subject(arguments, initial_heads="head" in config.features)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("sequences"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=len(questions))
        evaluation = evaluate(
            subject,
            questions,
            config,
            out,
            fresh=arguments.fresh,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    pictures = draw_pictures(subject, questions, config, evaluation, out / "pictures", arguments.pictures)
    page = write_report(evaluation.report, out, pictures)
    console.print(as_table([row[1:] for row in table_rows({subject.name: evaluation.report})]))
    if subject.heads_origin == "initial":
        console.print("the heads are untrained: made from W_Q, as training starts")
    if missing := evaluation.report["sequences_without_tracks"]:
        console.print(f"{missing} sequences had no point that is seen twice, and count nowhere")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


def _config(arguments: argparse.Namespace, asked: QuestionConfig) -> EvaluationConfig:
    from gasp_fast.evaluation.evaluate import EvaluationConfig

    names = () if arguments.features == "auto" else tuple(name.strip() for name in arguments.features.split(","))
    return EvaluationConfig(
        questions=asked, features=names, rope=arguments.rope, temperature=arguments.temperature, batch=arguments.batch
    )


def _subject(arguments: argparse.Namespace, initial_heads: bool) -> Subject:
    import torch

    from gasp_fast.evaluation.subject import open_subject

    return open_subject(
        arguments.model,
        device=arguments.device,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        frame_pixels=arguments.frame_pixels,
        initial_heads=initial_heads,
    )


def as_table(rows: list[list[str]]) -> Table:
    """Rows of text, the first one being headings, for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in rows[0]:
        words = heading in ("model", "features")
        table.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=heading != "model")
    for row in rows[1:]:
        table.add_row(*row)
    return table
