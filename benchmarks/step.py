"""Times full training steps, the cost of geometry in them, and each part of the model.

    benchmarks/step.sh [OUT]                           on a GPU, the real shapes, in less than nine minutes
    python benchmarks/step.py --shape tiny --out DIR   every path of this script on small shapes, on any machine

A step is that of the training loop: its model with heads and adapters, its loader and collator, on rendered scenes.
Three things differ from a run. Weights are random, since only shapes matter. The batches of a step are loaded once and
then repeated, so that no step waits for a disk; the time to load them is recorded separately. And every sequence has
an answer besides its tracks, so that the step without geometry still has a gradient.

The most important cases run first; no case begins once the time is up. One that runs out of memory, or lacks a package,
is recorded with the reason. After each case the result is written: `step-DEVICE-DATE.json` and a plot.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from step_cases import MEASURED, SHAPES, WARM_UP, Case, CaseData, cases
from step_profile import part_range, profiled, seconds_by_part
from step_report import one_line, print_targets, save, verdicts
from torch.profiler import profile
from transformers import AutoModelForImageTextToText

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.base_model import choose_attention, use_fast_modules
from gasp_fast.benchmarking.report import machine
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.calibration import MeasuredStep, calibrate
from gasp_fast.planning.gpus import GPU, GPUS, find_gpu, peak_flops
from gasp_fast.planning.shapes import ModelShape
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import quiet_libraries, start_processes
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import SupervisedModel, stored_dtype, supervise
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.workload import plan_run

# ---- one case -------------------------------------------------------------------------------------------------------


def measure(case: Case, data: CaseData, gpu: GPU) -> dict[str, Any]:
    """The record of one case."""
    config, processes = data.config(case), start_processes()
    batches, loading = data.batches(case, config, processes.device.type == "cuda")
    share = Share(0, 1, config.train.batch_size, case.at_once)
    model, steps = build_model(config, processes.device), WARM_UP + MEASURED + case.profile
    loop = TrainingLoop(config, model, SampleStream(config.data), share, steps, processes)
    times, peak_memory = timed_steps(loop, batches)

    sizes = [loop.batch_flops.sizes(batch) for batch in batches]
    step = statistics.median(times)
    tokens = sum(size.tokens for batch_sizes in sizes for size in batch_sizes)
    record = {
        "shape": dataclasses.asdict(loop.batch_flops.setup.shape),
        "step_seconds": step,
        "step_seconds_all": times,
        "sequences_per_s": config.train.batch_size / step,
        "tokens_per_s": tokens / step,
        "tokens_per_sequence": tokens / config.train.batch_size,
        "frame_tokens": sizes[0][0].visual // sizes[0][0].frames,
        "mfu": sum(map(loop.batch_flops, batches)) / step / peak_flops(processes.device),
        "peak_memory": peak_memory,
        "loading_seconds": loading,  # of one sequence, in one process
    }
    if case.profile:
        parts, attention = seconds_by_part(profiled_step(loop, batches))
        measured = MeasuredStep(seconds=step, accumulation=share.accumulation, sequences=sizes[-1], parts=parts)
        record["seconds_by_part"] = parts  # of one micro-batch, and of the optimiser
        record["attention_operations"] = attention
        record["assumptions"] = calibrate(loop.batch_flops.setup, gpu, measured)
    loop.state.accelerator.free_memory()
    return record


def build_model(config: TrainConfig, device: torch.device) -> SupervisedModel:
    """The model of the case with random weights, created on `device`, so that 16 GB are not copied from the CPU."""
    backbone = load_backbone(config.model.source)
    attention = choose_attention(config.model, device)
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForImageTextToText.from_config(
            backbone.config, dtype=stored_dtype(config), attn_implementation=attention
        )
        use_fast_modules(backbone, base, config.model)
        model = supervise(config, backbone, base, device)
    forwards = (getattr(module.forward, "__module__", "") for module in base.modules())
    if config.model.liger and not any(name.startswith("liger_kernel") for name in forwards):
        raise ValueError(f"liger-kernel leaves {base.config.model_type} as it is")  # Liger raises no error
    return model


def timed_steps(loop: TrainingLoop, batches: list[dict[str, Any]]) -> tuple[list[float], int | None]:
    """Seconds of each step after the warm-up, and the GPU's peak of memory in them (None without a GPU)."""
    gpu = torch.cuda.is_available()
    times = []
    for step in range(1, WARM_UP + MEASURED + 1):
        if gpu and step == WARM_UP + 1:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        loop.train_step(step, batches)
        synchronize()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:], torch.cuda.max_memory_allocated() if gpu else None


def profiled_step(loop: TrainingLoop, batches: list[dict[str, Any]]) -> profile:
    """A profile of the last micro-batch of one more step, and of the optimiser."""
    for batch in batches[:-1]:
        loop.forward_backward(batch)
    synchronize()
    with profiled(loop.model) as measured:
        loop.forward_backward(batches[-1])
        with part_range("optimiser"):
            loop.update(loop.steps, batches)
        synchronize()
    return measured


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- all cases ------------------------------------------------------------------------------------------------------


def measure_or_reason(case: Case, data: CaseData, gpu: GPU) -> dict[str, Any]:
    """The record of one case, or the reason why there is none. Frees the case's memory."""
    record: dict[str, Any] = {"name": case.name, **dataclasses.asdict(case)}
    try:
        with restored_transformers():
            record |= measure(case, data, gpu)
    except torch.OutOfMemoryError:
        record["failed"] = "out of memory"
    except Exception as error:  # the other cases still run
        record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        record["left_behind"] = torch.cuda.memory_allocated()
    return record


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


def add_plan(record: dict[str, Any], config: TrainConfig, records: list[dict[str, Any]], gpu: GPU) -> None:
    """Add what `gasp-fast plan` estimates for the case, with the first calibrated step of the same model."""
    calibrated = next((r for r in records if r.get("assumptions") and r["family"] == record["family"]), None)
    if calibrated is None or "step_seconds" not in record:
        return
    text = round(record["tokens_per_sequence"]) - record["frames"] * record["frame_tokens"]
    assumptions = dataclasses.replace(Assumptions(prompt_tokens=text), **calibrated["assumptions"])
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
    parser.add_argument("--seconds", type=float, default=420, help="no case begins later than this (default: 420)")
    arguments = parser.parse_args()
    if arguments.shape == "7b" and not torch.cuda.is_available():
        sys.exit("step.py: the 7B shapes need a GPU; --shape tiny runs every path without one")
    quiet_libraries()
    device, gpu = start_processes().device, this_gpu()
    result: dict[str, Any] = {"machine": machine(device), "shape": arguments.shape, "gpu": dataclasses.asdict(gpu)}
    result |= {"warm_up": WARM_UP, "measured": MEASURED, "cases": [], "out_of_time": []}
    with tempfile.TemporaryDirectory() as folder:
        data = CaseData(SHAPES[arguments.shape], Path(folder))
        print(f"{result['machine']}: scenes and models after {time.perf_counter() - began:.0f} s", flush=True)
        for case in cases(arguments.shape):
            if time.perf_counter() - began > arguments.seconds:
                result["out_of_time"].append(case.name)
                continue
            record = measure_or_reason(case, data, gpu)
            result["cases"].append(record)
            add_plan(record, data.config(case), result["cases"], gpu)
            print(f"{time.perf_counter() - began:4.0f} s  {one_line(record)}", flush=True)
            result["targets"] = verdicts(result)
            save(result, arguments.out)
    print_targets(result)


if __name__ == "__main__":
    main()
