"""Times full training steps, beside the usual step of a Hugging Face `Trainer`, and each part of the model.

    benchmarks/step.sh [OUT]                           on a GPU, the real shapes; four minutes tell the essential
    python benchmarks/step.py --shape tiny --out DIR   every path of this script on small shapes, on any machine
    python benchmarks/step.py --shape tiny --essential --rounds 20 --out DIR   there, our step against the Trainer's

A step is that of the training loop: its model with heads and adapters, its loader and collator, on rendered scenes.
Three things differ from a run. Weights are random, since only shapes matter. The batches of a step are loaded once and
then repeated, so that no step waits for a disk; the time to load them is recorded separately. And every sequence has
an answer besides its tracks, so that the step without geometry still has a gradient.

The cases of a group take turns on the same batches, and a ratio compares steps of the same round. On a GPU,
`seconds_in_a_row` is a step's time where none waits for the one before, as in a run, and `pauses` says where in a step
it had nothing to do (`step_pauses.py`). The essential group of each family holds our step with geometry, the Trainer's
step without (`step_trainer.py`), and ours without.

The most important groups run first; none begins once the time is up. A case that runs out of memory, or lacks a
package, is recorded with the reason. The result is written as soon as the cases of a group are timed, and after each
profile: `step-DEVICE-DATE.json`; after each group also a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from step_cases import ROUNDS, SHAPES, WARM_UP, Case, CaseData, groups
from step_ours import Base, OurSteps
from step_report import one_line, plot, print_targets, save, verdicts
from step_trainer import ROW, PlainRun, PlainTrainer, empty_cache, save_batches

from gasp_fast.benchmarking.report import machine
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.calibration import MeasuredStep, calibrate
from gasp_fast.planning.gpus import GPU, GPUS, find_gpu, peak_flops
from gasp_fast.planning.shapes import ModelShape
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries, start_processes
from gasp_fast.training.workload import BatchFlops, plan_run

Record = dict[str, Any]
Steps = OurSteps | PlainTrainer

# ---- a group of cases -----------------------------------------------------------------------------------------------


def measure(
    group: Sequence[Case], data: CaseData, gpu: GPU, rounds: int, keep: Callable[[list[Record]], None] = lambda _: None
) -> list[Record]:
    """The record of each case, or the reason why it has none. Frees the memory of the group.

    Records go to `keep` as soon as all cases are timed, and after each profile.
    """
    records: list[Record] = [{"name": case.name, **dataclasses.asdict(case), **EMPTY} for case in group]
    with restored_transformers():
        running = start(group, records, data)
        try:
            take_turns(group, running, records, rounds)
            summarise(group, records, data, gpu)
            keep(records)
            for number, steps in running.items():
                if group[number].profile:
                    with failure_recorded(records[number], "profile_failed"):
                        records[number] |= {k: v for k, v in steps.ask("profile").items() if k not in TIMES}
                    summarise(group, records, data, gpu)
                    keep(records)
        finally:
            for steps in running.values():
                steps.close()
            running.clear()
    gc.collect()
    empty_cache()
    return records


def start(group: Sequence[Case], records: list[Record], data: CaseData) -> dict[int, Steps]:
    """The models of the cases, by their place in the group. The Trainer's is built in its own process meanwhile."""
    running: dict[int, Steps] = {}
    processes, base = start_processes(), None
    for number, case in sorted(enumerate(group), key=lambda one: not one[1].trainer):
        with failure_recorded(records[number]):
            config = data.config(case)
            batches, _ = data.batches(case, processes.device.type == "cuda")
            if case.trainer:
                running[number] = start_trainer(config, batches, data.folder / "batches.pt")
                continue
            if base is None:
                base = Base(config, processes.device)
                # Ours keeps as many activations as fit the memory that the Trainer leaves.
                for trainer in running.values():
                    trainer.ask("rest")
            running[number] = OurSteps(config, base, batches, processes)
    return dict(sorted(running.items()))


def start_trainer(config: TrainConfig, batches: list[dict[str, Any]], path: Path) -> PlainTrainer:
    save_batches(batches, path)
    run = PlainRun(
        source=config.model.source,
        rank=config.lora.rank,
        alpha=config.lora.alpha or 2 * config.lora.rank,
        batches=str(path),
        clip=config.train.clip,
        learning_rate=config.train.learning_rate,
        threads=torch.get_num_threads(),
    )
    return PlainTrainer(run)


EMPTY: Record = {"all_seconds": (), "all_process_seconds": ()}
TIMES = ("seconds", "process_seconds", "peak_memory")  # a profiler changes them


def take_turns(group: Sequence[Case], running: dict[int, Steps], records: list[Record], rounds: int) -> None:
    """Time `rounds` steps of every case. A GPU takes a few at a time, since it frees its memory between turns."""
    gpu = torch.cuda.is_available()
    at_once = 3 if gpu else 1
    turns = [WARM_UP] + [at_once] * -(-rounds // at_once)
    for turn, count in enumerate(turns):
        for number in list(running):
            with failure_recorded(records[number]):
                if turn and gpu:
                    running[number].ask("step")  # fills the cache of free memory again
                answers = [running[number].ask("step") for _ in range(count)]
                if gpu and turn == len(turns) - 1:
                    records[number]["seconds_in_a_row"] = running[number].ask("row")["seconds"] / ROW
                    if not group[number].trainer:
                        records[number]["pauses"] = running[number].ask("pauses")["pauses"]
                running[number].ask("rest")
                if turn:
                    for name in ("seconds", "process_seconds"):
                        records[number][f"all_{name}"] += tuple(answer[name] for answer in answers)
                    records[number]["peak_memory"] = answers[-1]["peak_memory"]
            if "failed" in records[number]:
                running.pop(number).close()
                empty_cache()


@contextmanager
def failure_recorded(record: Record, key: str = "failed") -> Iterator[None]:
    """An exception becomes the reason in the record: the other cases still run."""
    try:
        yield
    except torch.OutOfMemoryError:
        record[key] = "out of memory"
    except Exception as error:
        traceback.print_exc()
        record[key] = f"{type(error).__name__}: {error}".splitlines()[0]


def summarise(group: Sequence[Case], records: Sequence[Record], data: CaseData, gpu: GPU) -> None:
    """Add what follows from the times of each case, and their ratios to the Trainer's."""
    for case, record in zip(group, records, strict=True):
        if "failed" not in record:
            add_rates(case, record, data, gpu)
    compare(records)


def add_rates(case: Case, record: Record, data: CaseData, gpu: GPU) -> None:
    """Add rates, MFU, and the corrections of the plan if there is a profile."""
    config, (batches, loading) = data.config(case), data.batches(case)
    flops: BatchFlops = data.flops(case)
    sizes = [flops.sizes(batch) for batch in batches]
    step = statistics.median(record["all_seconds"])
    tokens = sum(size.tokens for micro_batch in sizes for size in micro_batch)
    record |= {
        "shape": dataclasses.asdict(flops.setup.shape),
        "step_seconds": step,
        "sequences_per_s": config.train.batch_size / step,
        "tokens_per_s": tokens / step,
        "tokens_per_sequence": tokens / config.train.batch_size,
        "frame_tokens": sizes[0][0].visual // sizes[0][0].frames,
        "mfu": sum(map(flops, batches)) / step / peak_flops(start_processes().device),
        "loading_seconds": loading,  # of one sequence, in one process
        "head_bytes": 16 * flops.setup.parameters.heads,  # weights, gradients and two moments, in fp32
    }
    if "seconds_by_part" in record and not case.trainer:
        measured = MeasuredStep(seconds=step, micro_batches=sizes, parts=record["seconds_by_part"])
        ran = dataclasses.replace(
            flops.setup,
            kept_layers=record["layers"] - record["recomputed"],
            fused_layers="liger_kernel" in record["replaced"],
        )
        record["factors"] = calibrate(ran, gpu, measured)


def compare(records: Sequence[Record]) -> None:
    """Add the median ratio to the Trainer's step of the same round: of seconds, and of those of the process."""
    trainer = next((record for record in records if record["trainer"] and "failed" not in record), None)
    for record in records:
        if trainer is None or "failed" in record:
            continue
        for name in ("seconds", "process_seconds"):
            pairs = zip(record[f"all_{name}"], trainer[f"all_{name}"], strict=True)
            record[f"{name}_to_trainer"] = statistics.median(mine / theirs for mine, theirs in pairs)


@contextmanager
def restored_transformers() -> Iterator[None]:
    """Undo what Liger replaces in transformers' modules, which would change every later model of this process."""
    modelling = [
        module for name, module in sys.modules.items() if re.match(r"transformers\.models\..*\.modeling_", name)
    ]
    before = [dict(vars(module)) for module in modelling]
    try:
        yield
    finally:
        for module, names in zip(modelling, before, strict=True):
            vars(module).update(names)


# ---- all groups -----------------------------------------------------------------------------------------------------


def add_plan(record: Record, data: CaseData, records: list[Record], gpu: GPU) -> None:
    """Add what `gasp-fast plan` estimates for the case, with the first calibrated step of the same model."""
    calibrated = next((r for r in records if r.get("factors") and r["family"] == record["family"]), None)
    if calibrated is None or record["trainer"] or "step_seconds" not in record:
        return
    liger = "liger_kernel" in calibrated["replaced"] if record["liger"] is None else record["liger"]
    fields = {field.name for field in dataclasses.fields(Case)}
    config = data.config(dataclasses.replace(Case(**{n: record[n] for n in fields}), liger=liger))  # as it ran here
    text = round(record["tokens_per_sequence"]) - record["frames"] * record["frame_tokens"]
    assumptions = Assumptions(prompt_tokens=text, factors=calibrated["factors"])
    plan = plan_run(config, ModelShape(**record["shape"]), 1, gpu, assumptions, record["frame_tokens"])
    record["planned_seconds"] = plan.step_seconds
    record["plan_error"] = plan.step_seconds / record["step_seconds"] - 1
    record["planned_memory"] = plan.memory_needed


def this_gpu() -> GPU:
    """The data sheet of this machine's GPU; without one, the measured rate of the CPU and its memory."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        gpu = find_gpu(name)
        if gpu is None:
            raise ValueError(f"{name} is not among {', '.join(GPUS)}; add its data sheet to gasp_fast/planning/gpus.py")
        return gpu
    peak = peak_flops(torch.device("cpu"))
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return GPU(memory=memory, bf16=peak, tf32=peak, fp32=peak, bandwidth=10e9, link=10e9)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=420, help="no group begins later than this (default: 420)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed steps of each case (default: {ROUNDS})")
    parser.add_argument("--essential", action="store_true", help="only the first group of each family")
    parser.add_argument("--family", choices=list(SHAPES["7b"].models), help="only the cases of this model")
    parser.add_argument("--without-trainer", action="store_true", help="leave out the Trainer's steps")
    arguments = parser.parse_args()
    if arguments.shape == "7b" and not torch.cuda.is_available():
        sys.exit("step.py: the 7B shapes need a GPU; --shape tiny runs every path without one")
    quiet_libraries()
    device, gpu = start_processes().device, this_gpu()
    result: Record = {"machine": machine(device), "shape": arguments.shape, "gpu": dataclasses.asdict(gpu)}
    result |= {"warm_up": WARM_UP, "measured": arguments.rounds, "cases": [], "out_of_time": []}
    with tempfile.TemporaryDirectory() as folder:
        data = CaseData(SHAPES[arguments.shape], Path(folder))
        print(f"{result['machine']}: scenes and models after {time.perf_counter() - began:.0f} s", flush=True)
        for group in groups(arguments.shape):
            if (arguments.essential and not group[0].essential) or arguments.family not in (None, group[0].family):
                continue
            group = tuple(case for case in group if not (case.trainer and arguments.without_trainer))
            if time.perf_counter() - began > arguments.seconds:
                result["out_of_time"] += [case.name for case in group]
                continue
            measured = result["cases"]

            def keep(records: list[Record], measured: list[Record] = measured) -> None:
                for record in records:
                    add_plan(record, data, [*measured, *records], gpu)
                result["cases"] = [*measured, *records]
                result["targets"] = verdicts(result)
                save(result, arguments.out)

            records = measure(group, data, gpu, arguments.rounds, keep)
            keep(records)
            for record in records:
                print(f"{time.perf_counter() - began:4.0f} s  {one_line(record)}", flush=True)
            plot(result, arguments.out)
    print_targets(result)


if __name__ == "__main__":
    main()
