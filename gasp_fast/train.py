"""Train a vision-language model with geometric supervision, alone, under torchrun or under deepspeed.

Reads a recipe (those of configs/ are the paper's), every key of which can be overridden. Writes into run.out:
config.yaml as it was understood, log.jsonl, checkpoint-N/, and at the end training.png. The same command goes on
where a run was stopped.

examples:
  python -m gasp_fast.train configs/tiny_cpu.yaml train.steps=100
  python -m gasp_fast.train configs/qwen2_5_vl_7b.yaml --dry-run
  torchrun --nproc-per-node 8 -m gasp_fast.train configs/qwen2_5_vl_7b.yaml
  deepspeed --module gasp_fast.train configs/qwen2_5_vl_7b.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gasp_fast.config.loader import load_config, to_yaml
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.model import build_model
from gasp_fast.training.processes import (
    Processes,
    quiet_libraries,
    read_deepspeed,
    start_processes,
    stop_processes,
    zero_stage,
)
from gasp_fast.training.stream import SampleStream, Share, steps_of
from gasp_fast.training.trainer import GaspTrainer

from .files import write_atomically
from .run_folder import CONFIG
from .training import checkpoints, dry_run, guards


def train(config: TrainConfig, *, only_try: bool = False) -> None:
    """One training run; with `only_try` its first step alone, and a report of what it would take."""
    guards.check_disk(config.run)
    deepspeed = read_deepspeed(config.deepspeed)
    processes = start_processes(deepspeed)
    with guards.alone_in(Path(config.run.out)) if processes.first and not only_try else nullcontext():
        _train(config, deepspeed, processes, only_try)


def _train(config: TrainConfig, deepspeed: dict[str, Any] | None, processes: Processes, only_try: bool) -> None:
    resume = None if only_try else checkpoints.to_resume(Path(config.run.out), config.run.resume)
    if resume is not None:
        guards.check_resume(config, processes.ranks, zero_stage(deepspeed), checkpoints.read_about(resume), resume)

    stream = SampleStream(config.data)
    share = Share(processes.rank, processes.ranks, config.train.batch_size, config.train.micro_batch_size)
    steps = steps_of(config.train, stream)

    model = build_model(config, processes.device)
    if config.train.mode == "lora":
        guards.check_adapters(model)
    deepspeed = read_deepspeed(config.deepspeed, model.backbone.hidden_size)

    trainer = GaspTrainer(config, model, stream, share, steps, processes, deepspeed)
    if only_try:
        dry_run.report(trainer)
        return
    if processes.first:
        write_atomically(Path(config.run.out) / CONFIG, to_yaml(config).encode())
        if config.run.progress:
            begin = "from the beginning" if resume is None else f"on from {resume}"
            print(f"{dry_run.describe(trainer)}\n{steps:,} steps into {config.run.out}, {begin}", file=sys.stderr)
    trainer.run(resume)


def main(arguments: Sequence[str] | None = None) -> int:
    description, _, examples = str(__doc__).partition("\nexamples:\n")
    parser = argparse.ArgumentParser(
        prog="python -m gasp_fast.train",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="instead of what the recipe says: train.learning_rate=2e-4",
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, run one step, report, stop")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # older launchers pass it
    told = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    try:
        train(load_config(TrainConfig, told.config, told.overrides), only_try=told.dry_run)
    except (ValueError, OSError) as error:
        if told.traceback:
            raise
        print(f"gasp_fast.train: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
