"""What a recipe needs and costs on a cluster, from a written cost model: memory, step time, GPU-hours. Runs nothing.

Counts are exact, efficiencies are assumptions (`gasp_fast/planning/workload.py` states them all): take times as a
guess within a factor of two until a step has been measured on your GPUs (`benchmarks/step.sh`, then `--measured FILE`).

examples:
  gasp-fast plan configs/qwen2_5_vl_7b.yaml --gpus 32 --gpu h200
  gasp-fast plan configs/llava_next_video_7b.yaml --gpus 8 --gpu h100
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gasp_fast.planning.cost_model import GPU, Plan
    from gasp_fast.planning.shapes import ModelShape
    from gasp_fast.planning.workload import Assumptions
    from gasp_fast.training.config import TrainConfig

HELP = "predict memory, time and GPU-hours of a recipe"
GPU_NAMES = ("a100", "b200", "h100", "h200")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a recipe: configs/*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to it")
    parser.add_argument("--gpus", type=int, default=32, metavar="N", help="how many")
    parser.add_argument("--gpu", choices=GPU_NAMES, default="h200", help="which")
    parser.add_argument(
        "--frame-tokens", type=int, metavar="N", help="visual tokens of a frame (default: the recipe's)"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="sequences of an epoch (default: the annotations')")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="efficiencies from a result of benchmarks/step.sh"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.config.loader import load_config
    from gasp_fast.planning.calibration import read_measured
    from gasp_fast.planning.cost_model import GPUS, make_plan
    from gasp_fast.planning.shapes import shape_of
    from gasp_fast.planning.workload import Assumptions
    from gasp_fast.training.config import TrainConfig

    for name in ("gpus", "frame_tokens", "sequences"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    shape, gpu = shape_of(config.model.source), GPUS[arguments.gpu]
    given, origin = Assumptions(), "efficiencies are assumptions, not yet measured on a GPU"
    if arguments.measured:
        given, measured = read_measured(arguments.measured, shape)
        origin = f"efficiencies are those of {measured}; what no step tells is assumed"
    plan = make_plan(config, shape, arguments.gpus, gpu, given, arguments.frame_tokens, arguments.sequences)

    console = Console(highlight=False)
    console.print(
        f"{arguments.config}: {plan.gpus} x {arguments.gpu}, {plan.frame_tokens} tokens a frame, sequences of "
        f"{plan.mean_tokens:,.0f} tokens in the mean and {plan.longest_tokens:,} at most"
    )
    console.print(_counts(plan))
    console.print(_memory(plan))
    console.print(_time(plan))
    for line in conclusions(plan):
        console.print(line)
    if arguments.gpu == "h200" and shape.language_parameters > 5e9:
        console.print(against_paper(plan, config, shape, gpu, given))
    for note in (*plan.notes, origin):
        console.print(f"note: {note}", style="dim")
    return 0 if plan.bytes_needed <= plan.capacity else 1


def conclusions(plan: Plan) -> list[str]:
    """The plan in sentences: what it takes, whether it fits, what dominates."""
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    slowest = max(plan.seconds, key=lambda name: plan.seconds[name])
    fits = "fits" if plan.bytes_needed <= plan.capacity else "DOES NOT FIT"
    return [
        f"memory {fits}: {plan.bytes_needed / 1e9:.0f} of {plan.capacity / 1e9:.0f} GB a GPU; most of it is {largest}",
        f"a step of {plan.batch_size} sequences takes {plan.step_seconds:.2f} s, {slowest} more than anything else "
        f"({plan.seconds[slowest] / plan.step_seconds:.0%}); {plan.rate:.2f} sequences a second on each GPU, "
        f"MFU {plan.mfu:.0%}",
        f"heads and geometric loss take {plan.geometry_share:.0%} of the time a GPU computes",
        f"{plan.steps:,} steps: {plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU-hours",
    ]


def against_paper(plan: Plan, config: TrainConfig, shape: ModelShape, gpu: GPU, given: Assumptions) -> str:
    """The rate that the paper's totals imply, and what it would take here."""
    from gasp_fast.planning.cost_model import PAPER_RATE, tokens_at_rate

    most = tokens_at_rate(PAPER_RATE, config, shape, plan.gpus, gpu, given)
    told = (
        f"the paper's totals imply {PAPER_RATE:.1f} sequences a second on each H200; this model says {plan.rate:.2f}. "
    )
    if most is None:
        return told + "No number of tokens a frame would reach that rate with this recipe."
    verb = "would allow" if most >= plan.frame_tokens else "would need frames of at most"
    return told + f"That rate {verb} {most} tokens a frame; this recipe has {plan.frame_tokens}."


def _counts(plan: Plan) -> Table:
    table = Table("part", "forward", "backward", "recomputed", title="TFLOP of a mean sequence", title_justify="left")
    for name, work in plan.operations.items():
        if work.total:
            table.add_row(name, *(f"{value / 1e12:.2f}" for value in (work.forward, work.backward, work.recompute)))
    counted = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items() if count)
    table.caption = f"parameters: {counted}"
    return table


def _memory(plan: Plan) -> Table:
    table = Table("purpose", "GB", title="memory of a GPU", title_justify="left")
    for name, bytes_ in plan.memory.items():
        if bytes_:
            table.add_row(name, f"{bytes_ / 1e9:.2f}")
    table.add_section()
    table.add_row("together", f"{plan.bytes_needed / 1e9:.2f}")
    return table


def _time(plan: Plan) -> Table:
    table = Table("part", "s", "share", title=f"time of a step of {plan.batch_size} sequences", title_justify="left")
    for name, value in plan.seconds.items():
        if value:
            table.add_row(name, f"{value:.3f}", f"{value / plan.step_seconds:.0%}")
    table.add_section()
    table.add_row("together", f"{plan.step_seconds:.3f}", "100%")
    return table
