"""Trains a recipe: `python -m gasp_fast.train RECIPE`, alone, under torchrun or under deepspeed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from gasp_fast.config import train_command
from gasp_fast.config.loader import load_config, objective_of
from gasp_fast.config.recipes import recipe_file
from gasp_fast.evaluation.dataset import EvaluationSetConfig
from gasp_fast.evaluation.held_out import SequencesInMemory
from gasp_fast.files import one_line
from gasp_fast.g2vlm.config import G2TrainConfig
from gasp_fast.planning.training_setup import Sharding
from gasp_fast.processes import print_anything
from gasp_fast.training import checkpoints, distributed, dry_run, guards, same_run
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.gasp import Gasp
from gasp_fast.training.held_out import kind_of_features, share_held_out
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.objective import Objective
from gasp_fast.training.signals import INTERRUPTED, Interrupted, StopSignals
from gasp_fast.training.start_up import StartUp
from gasp_fast.training.starts import record_start
from gasp_fast.training.stream import SampleStream


def train(
    config: TrainConfig | G2TrainConfig,
    *,
    try_one_step: bool = False,
    signals: StopSignals | None = None,
    start_up: StartUp | None = None,
) -> None:
    """Train, from the beginning or from a checkpoint. With `try_one_step`, take and report only the first step.

    Raises `Interrupted` where one of `signals` ended the run early.
    """
    start_up = StartUp() if start_up is None else start_up
    start_up.add("imports and model")
    guards.check_trackers(config.run)
    out = Path(config.run.out)
    deepspeed = distributed.read_deepspeed(config.deepspeed)
    stage = Sharding.of(deepspeed).stage
    processes = distributed.start_processes(deepspeed is not None, config.run.timeout)
    with guards.alone_in(out) if processes.first and not try_one_step else nullcontext():
        resume = None if try_one_step else checkpoints.to_resume(out, config.run.resume, processes)
        guards.check_disk(config.run)  # after what a killed run left has been removed
        objective = make_objective(config, stage, processes)
        for line in guards.check_left_out(config.run, objective.stream):
            if processes.first:
                print(line, file=sys.stderr)
        start_up.add("data")
        share = objective.share(processes)
        if resume is not None:
            check = partial(same_run.check_same_run, objective, processes.world_size, resume)
            processes.decided_by_first(check)
        objective.build(processes.device)
        if resume is not None:
            objective.read_weights(resume)
        if processes.first and (try_one_step or config.run.progress):
            print(objective.describe(share, processes), file=sys.stdout if try_one_step else sys.stderr)
        loop = TrainingLoop(objective, share, objective.steps, processes, deepspeed, signals)
        start_up.add("imports and model", heads=objective.head_seconds)
        if try_one_step:
            dry_run.try_step(loop)
            return
        record_start(config, objective.stream, processes, stage, resume)
        if processes.first:
            same_run.write_configuration(config, out, resume)
        loop.run(resume, start_up)


def make_objective(config: TrainConfig | G2TrainConfig, stage: int, processes: distributed.Processes) -> Objective:
    """What a configuration trains, with its data; `stage`: of ZeRO. The model comes later."""
    if isinstance(config, G2TrainConfig):
        from gasp_fast.g2vlm.objective import G2Objective

        return G2Objective(config, stage, processes.decided_by_first)
    guards.check_sharding(config, stage)
    stream = SampleStream(config.data, processes.decided_by_first)
    return Gasp(config, stream, held_out_sequences(config) if config.evaluate.scenes else None)


def read_recipe(recipe: str, overrides: Sequence[str]) -> TrainConfig | G2TrainConfig:
    """The configuration of the kind that the recipe's key `objective` names; without one, of GASP."""
    path = recipe_file(recipe)
    kind = objective_of(path)
    if kind is None:
        return load_config(TrainConfig, path, overrides)
    if kind != "g2vlm":
        raise ValueError(f"{path}: objective = {kind!r} must be 'g2vlm', or absent for GASP")
    return load_config(G2TrainConfig, path, overrides)


def held_out_sequences(config: TrainConfig) -> SequencesInMemory:
    """The sequences of `evaluate.scenes`, divided evenly among its folders."""
    evaluate = config.evaluate
    folders = [Path(scenes) for scenes in evaluate.scenes]
    if evaluate.sequences < len(folders):
        raise ValueError(f"evaluate.sequences = {evaluate.sequences} is less than one for each of evaluate.scenes")
    sizes = {"frames": evaluate.frames, "grid": evaluate.grid, "max_gap": evaluate.max_gap}
    number, more = divmod(evaluate.sequences, len(folders))
    sets = [
        EvaluationSetConfig(sequences=number + (at < more), held_out=share_held_out(config, folder), **sizes)
        for at, folder in enumerate(folders)
    ]
    sequences = SequencesInMemory(list(zip(folders, sets, strict=True)), kind_of_features(config))
    if int(os.environ.get("RANK", 0)) == 0:
        for name, reason in sequences.unreadable:
            print(f"evaluate.scenes: {name}: left out: {reason}", file=sys.stderr)
    return sequences


def main(arguments: Sequence[str] | None = None) -> int:
    parser = train_command.RecipeParser(
        prog="python -m gasp_fast.train",
        description=train_command.DESCRIPTION,
        epilog=f"examples:\n{train_command.MODULE_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_command.add_arguments(parser)
    return run(parser.parse_intermixed_args(arguments), since_process=arguments is None)


def run(options: argparse.Namespace, since_process: bool, command: str = "gasp_fast.train") -> int:
    """Train by the arguments of `train_command`; the exit code. `command` begins what is said in errors."""
    distributed.quiet_libraries()
    print_anything()
    try:
        with StopSignals(distributed.launched()) as signals:
            config = read_recipe(options.config, options.overrides)
            start_up = StartUp(since_process=since_process)
            train(config, try_one_step=options.dry_run, signals=signals, start_up=start_up)
    except Interrupted as interruption:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{command}: {interruption}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"{command}: {one_line(error)}", file=sys.stderr, flush=True)  # libraries write several lines
        return 1
    except RuntimeError as error:
        if options.traceback or not distributed.lost_process(error):
            raise
        cause = f"process {os.environ.get('RANK', 0)} lost another, which ended or froze: {one_line(error)}"
        print(f"{command}: {cause}", file=sys.stderr, flush=True)
        return 1
    finally:
        distributed.stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
