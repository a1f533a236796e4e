"""Estimates memory, FLOPs, step time and GPU-hours of a recipe on a cluster. Needs no GPU and loads no weights.

Parameters, FLOPs and activations are counted; efficiencies are those of an H200, listed in
`gasp_fast/planning/assumptions.py`. They reproduce the steps that were measured on it within 10 %. Other GPUs and later
versions differ: measure a step (`benchmarks/step.sh`, then `--measured FILE`).

examples:
  gasp-fast plan qwen2_5_vl_7b --gpus 32 --gpu h200
  gasp-fast plan llava_next_video_7b --gpus 8 --gpu h100
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gasp_fast.planning.gpus import GPUS

if TYPE_CHECKING:
    from collections.abc import Callable

    from gasp_fast.planning.assumptions import Assumptions
    from gasp_fast.planning.plan import Plan
    from gasp_fast.planning.readings import Reading

MOST_SEQUENCES = 1_000_000_000  # of an epoch; there are no more GPUs or tokens of a frame either
HELP = "estimate memory, time and GPU-hours of a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RECIPE", help="a YAML file, or the name of a recipe of the package")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="changes to it")
    parser.add_argument("--gpus", type=int, default=32, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200", help="type of GPU")
    parser.add_argument(
        "--frame-tokens", type=int, metavar="N", help="visual tokens of a frame (default: the recipe's)"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="sequences of an epoch (default: the annotations')")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="correct the parts of a step by a result of benchmarks/step.sh"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.g2vlm.config import G2TrainConfig
    from gasp_fast.planning.assumptions import Assumptions
    from gasp_fast.planning.calibration import read_measured
    from gasp_fast.planning.plan import PAPER_SEQUENCES
    from gasp_fast.planning.shapes import shape_from_source
    from gasp_fast.train import read_recipe
    from gasp_fast.training.workload import known_epoch, plan_run, plans_of_readings

    for name in ("gpus", "frame_tokens", "sequences"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MOST_SEQUENCES:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1 and at most {MOST_SEQUENCES:,}")
    config, gpu = read_recipe(arguments.config, arguments.overrides), GPUS[arguments.gpu]
    if isinstance(config, G2TrainConfig):
        from gasp_fast.g2vlm.plan_tables import print_plan

        return (
            0
            if print_plan(config, arguments.gpus, gpu, f"{arguments.config}: {arguments.gpus} x {arguments.gpu}")
            else 1
        )
    shape = shape_from_source(config.model.source)
    assumptions, notes = Assumptions(), []
    if arguments.sequences is None and config.train.steps is None and known_epoch(config) is None:
        notes.append(
            f"there are no annotations here: an epoch is taken to be the paper's {PAPER_SEQUENCES:,} sequences"
        )
    origin = "efficiencies are those of an H200; this step has not been measured"
    if arguments.measured:
        assumptions, step = read_measured(arguments.measured, shape)
        origin = f"parts of a step are corrected by {step}; all else is assumed"

    def plan_at(frame_tokens: int | None, sequences: int | None = None) -> Plan:
        return plan_run(config, shape, arguments.gpus, gpu, assumptions, frame_tokens, sequences)

    plan = plan_at(arguments.frame_tokens, arguments.sequences)
    console = Console(highlight=False)
    console.print(
        f"{arguments.config}: {plan.gpus} x {arguments.gpu}, {plan.frame_tokens} tokens a frame, sequences of "
        f"{plan.mean_tokens:,.0f} tokens in the mean and {plan.longest.tokens:,} at most"
    )
    for table in (flops_table(plan), memory_table(plan), time_table(plan)):
        console.print(table)
    for line in conclusions(plan):
        console.print(line)
    if arguments.gpu == "h200" and shape.language_parameters > 5e9:
        console.print(against_paper(plan, lambda tokens: plan_at(tokens, sequences=1)))
    if shape.language_parameters > 5e9 and (
        plans := plans_of_readings(config, shape, arguments.gpus, gpu, assumptions, arguments.frame_tokens)
    ):
        console.print(readings_table(plans))
    if plan.seconds["geometric loss"] and plan.setup.embedding_precision == "fp32":
        notes.append(fp32_loss(plan, assumptions))
    if config.model.liger == "auto":
        notes.append("liger-kernel is taken to be installed there, as by gasp-fast\\[gpu]")
    for note in (*notes, origin):
        console.print(f"note: {note}", style="dim")
    return 0 if plan.fits else 1


def conclusions(plan: Plan) -> list[str]:
    """The plan in sentences: whether it fits, how long it takes, and what takes most."""
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    slowest = max(plan.seconds, key=lambda name: plan.seconds[name])
    evenly = f"useful share {plan.dealt.useful_share:.1%}: the rest of the time, GPUs wait for the slowest of them"
    return [
        f"memory {'fits' if plan.fits else 'DOES NOT FIT'}: {plan.memory_needed / 1e9:.0f} of "
        f"{plan.gpu.memory / 1e9:.0f} GB a GPU; the largest part is {largest}",
        f"activations of {plan.setup.kept_layers} of {plan.setup.shape.layers} decoder layers are kept, the others are "
        "recomputed",
        f"a step of {plan.setup.batch_size} sequences takes {plan.step_seconds:.2f} s; the largest part is {slowest} "
        f"({plan.seconds[slowest] / plan.step_seconds:.0%}); {plan.rate:.2f} sequences a second on each GPU, "
        f"MFU {plan.mfu:.0%}",
        *([evenly] if plan.gpus > 1 else []),
        f"heads and geometric loss take {plan.geometry_share:.0%} of the time a GPU computes",
        f"{plan.steps:,} steps: {plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU-hours",
    ]


def against_paper(plan: Plan, plan_at: Callable[[int], Plan]) -> str:
    """The rate that the paper's totals imply, and the frame size at which this recipe would reach it."""
    from gasp_fast.planning.plan import PAPER_RATE, tokens_at_rate

    most = tokens_at_rate(PAPER_RATE, plan_at)
    rates = (
        f"the paper's totals imply {PAPER_RATE:.1f} sequences a second on each H200; this plan says {plan.rate:.2f}."
    )
    if most is None:
        late = plan_at(1).seconds["idle"] > 0
        cause = ": with small frames the GPU waits for its host; give train.tokens_at_once" if late else ""
        return f"{rates} No number of tokens a frame would reach that rate with this recipe{cause}."
    verb = "would allow" if most >= plan.frame_tokens else "would need frames of at most"
    return f"{rates} That rate {verb} {most} tokens a frame; this recipe has {plan.frame_tokens}."


def fp32_loss(plan: Plan, assumptions: Assumptions) -> str:
    """What fp32 products cost the geometric loss."""
    from gasp_fast.planning.plan import make_plan

    setup = replace(plan.setup, embedding_precision="bf16")
    bf16 = make_plan(setup, plan.mix, plan.steps, plan.gpus, plan.gpu, assumptions)
    return (
        "fp32 embeddings make the loss's products IEEE fp32; heads.embeddings=bf16 would take the loss from "
        f"{plan.seconds['geometric loss']:.2f} s to {bf16.seconds['geometric loss']:.2f} s of a step"
    )


def readings_table(plans: list[tuple[Reading, Plan]]) -> Table:
    from gasp_fast.planning.plan import PAPER_GPU_HOURS, PAPER_SEQUENCES

    title = f"this recipe, if the paper's {PAPER_SEQUENCES / 1e6:.2f} M annotations are"
    table = Table("", "sequences", "questions", "steps", "days", "GPU-hours", title=title, title_justify="left")
    for reading, plan in plans:
        counts = (reading.sequences, reading.questions, plan.steps)
        table.add_row(
            reading.meaning, *(f"{count:,}" for count in counts), f"{plan.hours / 24:.2f}", f"{plan.gpu_hours:,.0f}"
        )
    table.caption = f"samples of an epoch; the paper: {PAPER_GPU_HOURS} GPU-hours"
    return table


def flops_table(plan: Plan) -> Table:
    table = Table("part", "forward", "backward", "recomputed", title="TFLOP of a mean sequence", title_justify="left")
    for name, flops in plan.flops.items():
        if flops.total:
            table.add_row(name, *(f"{value / 1e12:.2f}" for value in (flops.forward, flops.backward, flops.recompute)))
    counts = vars(plan.setup.parameters).items()
    table.caption = f"parameters: {', '.join(f'{kind} {count / 1e6:,.1f} M' for kind, count in counts if count)}"
    return table


def memory_table(plan: Plan) -> Table:
    table = Table("purpose", "GB", title="memory of a GPU", title_justify="left")
    for name, bytes_ in plan.memory.items():
        if bytes_:
            table.add_row(name, f"{bytes_ / 1e9:.2f}")
    table.add_section()
    table.add_row("total", f"{plan.memory_needed / 1e9:.2f}")
    return table


def time_table(plan: Plan) -> Table:
    title = f"time of a step of {plan.setup.batch_size} sequences"
    table = Table("part", "s", "share", title=title, title_justify="left")
    for name, seconds in plan.seconds.items():
        if seconds:
            table.add_row(name, f"{seconds:.3f}", f"{seconds / plan.step_seconds:.0%}")
    table.add_section()
    table.add_row("total", f"{plan.step_seconds:.3f}", "100%")
    return table
