"""The estimate of a run of G²VLM as `gasp-fast plan` prints it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from gasp_fast.planning.gpus import GPU
from gasp_fast.planning.training_setup import Sharding
from gasp_fast.training.distributed import read_deepspeed

from .config import G2TrainConfig
from .planning import G2Plan, plan_run, shapes_of

TAIL = 2048  # tokens of a question and its pictures in the joint stage, where nothing else is known


def print_plan(config: G2TrainConfig, gpus: int, gpu: GPU, title: str) -> bool:
    """Returns whether it fits the memory of the GPUs."""
    shapes, known = shapes_of(config)
    sharding = Sharding.of(read_deepspeed(config.deepspeed))
    plan = plan_run(config, shapes, gpus, gpu, sharding, TAIL if config.data.questions else 0)
    console, frames = Console(highlight=False), plan.arrangement
    console.print(
        f"{title}: the largest packs have {plan.sequences} x {frames.frames} frames of {frames.rows} x "
        f"{frames.columns} patches, {plan.sequences * frames.patches:,} in all"
    )
    for table in (_flops_table(plan), _table("memory of a GPU", "GB", plan.memory, 1e9), _time_table(config, plan)):
        console.print(table)
    console.print(
        f"memory {'fits' if plan.fits else 'DOES NOT FIT'}: {plan.memory_needed / 1e9:.0f} of {gpu.memory / 1e9:.0f} "
        f"GB a GPU"
    )
    console.print(
        f"at most, where all steps have {frames.frames} frames: {plan.step_seconds:.2f} s a step; {plan.steps:,} steps "
        f"take {plan.gpu_hours:,.0f} GPU-hours"
    )
    notes = ["nothing of G²VLM has been measured on a GPU: efficiencies are those of GASP's steps on an H200"]
    if not known:
        notes.append("model.source and model.encoder are no folders: sizes are those of Qwen2-VL-2B and DINOv2-large")
    for note in notes:
        console.print(f"note: {note}", style="dim")
    return plan.fits


def _flops_table(plan: G2Plan) -> Table:
    table = Table("part", "forward", "backward", "recomputed", title="TFLOP of such a pack", title_justify="left")
    for name, flops in plan.flops.items():
        if flops.total:
            table.add_row(name, *(f"{value / 1e12:.2f}" for value in (flops.forward, flops.backward, flops.recompute)))
    table.caption = (
        f"parameters: {', '.join(f'{name} {count / 1e6:,.0f} M' for name, count in plan.parameters.items())}"
    )
    return table


def _time_table(config: G2TrainConfig, plan: G2Plan) -> Table:
    return _table(f"time of a step of {config.train.batch_size} sequences", "s", plan.seconds, 1.0)


def _table(title: str, unit: str, values: dict[str, float], by: float) -> Table:
    table, total = Table("part", unit, "share", title=title, title_justify="left"), sum(values.values())
    for name, value in values.items():
        table.add_row(name, f"{value / by:.2f}", f"{value / total:.0%}")
    table.add_section()
    table.add_row("total", f"{total / by:.2f}", "100%")
    return table
