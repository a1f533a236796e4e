"""Full training steps: what they take, what geometry costs of them, and where their time goes.

    benchmarks/step.sh [OUT]                           on a GPU, the real shapes, in less than nine minutes
    python benchmarks/step.py --shape tiny --out DIR   every path of this script on small shapes, on any machine

A step is the training engine's own: its model with heads and adapters, its `Trainer`, its loader and collator, on
rendered scenes. Only three things are not as in a run. Weights are random, since only shapes matter. A step's batches
are loaded once and then repeated, so that no step waits for a disk; what loading takes is told apart. And every
sequence has an answer besides its tracks, so that the step without geometry still has a gradient to take back.

Cases run in the order of their importance until the time is up; one that runs out of memory, or lacks a package, is
recorded as such. The result is written anew after each: `step-DEVICE-DATE.json` and a plot.
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from step_cases import MEASURED, SHAPES, WARM_UP, Case, Repeated, Workshop, cases
from step_profile import profiled, seconds_by_part
from step_report import judged, one_line, print_targets, save
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, TrainerCallback

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.base_model import choose_attention
from gasp_fast.benchmarking.report import machine
from gasp_fast.planning.calibration import MeasuredStep, calibrate
from gasp_fast.planning.cost_model import GPU, GPUS, make_plan
from gasp_fast.planning.shapes import ModelShape
from gasp_fast.planning.workload import Assumptions, Sequence
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.model import SupervisedModel, stored_dtype, supervise
from gasp_fast.training.processes import quiet_libraries, start_processes
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.throughput import peak_flops, sequences_of_batch
from gasp_fast.training.trainer import GaspTrainer


class StepTrainer(GaspTrainer):
    """The training engine's trainer on repeated batches; it saves nothing."""

    batches: list[dict[str, Any]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Repeated(self.batches, self.steps), batch_size=None)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        with record_function("part:optimiser"):
            return super()._clip_grad_norm(model)


class Watch(TrainerCallback):
    """Notes when each step ends, and profiles the last micro-batch of the run, where asked to."""

    def __init__(self, model: SupervisedModel, accumulation: int, profile_step: int | None) -> None:
        self.model, self.accumulation, self.profile_step = model, accumulation, profile_step
        self.ends: list[float] = []
        self.found: Any = None
        self._within, self._stack = 0, ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._within = 0
        if state.global_step == WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._begin_profile(state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._within += 1
        self._begin_profile(state)

    def _begin_profile(self, state: Any) -> None:
        if state.global_step + 1 == self.profile_step and self._within + 1 == self.accumulation:
            wait()
            self.found = self._stack.enter_context(profiled(self.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait()
        self.ends.append(time.perf_counter())
        if state.global_step == WARM_UP + MEASURED:
            self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self._stack.close()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(case: Case, workshop: Workshop, gpu: GPU) -> dict[str, Any]:
    """The record of one case."""
    config, processes = workshop.config(case), start_processes(None)
    batches, loading = workshop.batches(case, config, processes.device.type == "cuda")
    backbone = load_backbone(config.model.source)
    torch.manual_seed(0)
    with torch.device(processes.device):  # random weights where they are wanted: no 16 GB pass through the CPU
        base = AutoModelForImageTextToText.from_config(
            backbone.config,
            dtype=stored_dtype(config),
            attn_implementation=choose_attention(config.model, processes.device),
        )
        model = supervise(config, backbone, base, processes.device)
    if case.liger and not any(
        getattr(module.forward, "__module__", "").startswith("liger_kernel") for module in base.modules()
    ):
        raise ValueError(f"liger-kernel leaves {case.family} as it is")  # it does not say so itself
    share = Share(0, 1, config.train.batch_size, case.at_once)
    (workshop.folder / "run").mkdir(exist_ok=True)
    trainer = StepTrainer(config, model, SampleStream(config.data), share, config.train.steps or 0, processes)
    trainer.batches = batches
    trainer.args.save_strategy = "no"
    trainer.args.set_save(strategy="no")
    watch = Watch(model, share.accumulation, config.train.steps if case.profile else None)
    trainer.add_callback(watch)
    trainer.run(None)

    shape, token = trainer.operations.shape, backbone.visual_token_id
    sequences = [sequences_of_batch(batch, token, shape.frame_tokens) for batch in batches]
    times = [after - before for before, after in zip(watch.ends[WARM_UP - 1 :], watch.ends[WARM_UP:], strict=False)]
    step = statistics.median(times[:MEASURED])
    operations = sum(trainer.operations(of) for of in sequences)
    tokens = sum(sequence.tokens for of in sequences for sequence in of)
    record = {
        "shape": dataclasses.asdict(shape),
        "step_seconds": step,
        "step_seconds_all": times[:MEASURED],
        "sequences_per_s": config.train.batch_size / step,
        "tokens_per_s": tokens / step,
        "tokens_per_sequence": tokens / config.train.batch_size,
        "frame_tokens": sequences[0][0].visual // sequences[0][0].frames,
        "mfu": operations / step / peak_flops(processes.device),
        "peak_memory": watch.peak,  # null without a GPU: a process's peak tells nothing of one case
        "loading_seconds": loading,  # of one sequence, in one process
    }
    if case.profile:
        record |= profile_record(config, trainer, watch, step, sequences[-1], gpu)
    trainer.accelerator.free_memory()
    return record


def profile_record(
    config: TrainConfig, trainer: StepTrainer, watch: Watch, step: float, sequences: list[Sequence], gpu: GPU
) -> dict[str, Any]:
    """Where the time of the last micro-batch went, and what that means for a plan."""
    parts, attention = seconds_by_part(watch.found)
    measured = MeasuredStep(seconds=step, accumulation=trainer.share.accumulation, sequences=sequences, parts=parts)
    return {
        "seconds_by_part": parts,  # of one micro-batch, and of the optimiser
        "attention_operations": attention,
        "assumptions": calibrate(config, trainer.operations.shape, gpu, measured),
    }


def predict(config: TrainConfig, record: dict[str, Any], records: list[dict[str, Any]], gpu: GPU) -> None:
    """What `gasp-fast plan` says of the case after the first calibrated step of the same model."""
    known = next((r for r in records if r.get("assumptions") and r["family"] == record["family"]), None)
    if known is None or "step_seconds" not in record:
        return
    text = round(record["tokens_per_sequence"]) - record["frames"] * record["frame_tokens"]
    given = dataclasses.replace(Assumptions(prompt_tokens=text), **known["assumptions"])
    plan = make_plan(config, ModelShape(**record["shape"]), 1, gpu, given, record["frame_tokens"])
    record["planned_seconds"] = plan.step_seconds
    record["plan_error"] = plan.step_seconds / record["step_seconds"] - 1
    record["planned_memory"] = plan.bytes_needed


def this_gpu() -> GPU:
    """The data sheet of the GPU at hand; without one, of this CPU, as far as it is known."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        for known, gpu in GPUS.items():
            if known in name:
                return gpu
        raise ValueError(
            f"{name} is not among {', '.join(GPUS)}; add its data sheet to gasp_fast/planning/cost_model.py"
        )
    peak = peak_flops(torch.device("cpu"))
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return GPU(memory=memory, bf16=peak, tf32=peak, fp32=peak, bandwidth=10e9, link=10e9)


@contextmanager
def patches_undone() -> Iterator[None]:
    """Liger replaces classes and functions in transformers' modules: for every later model of this process, too."""
    modelling = [
        module for name, module in sys.modules.items() if re.match(r"transformers\.models\..*\.modeling_", name)
    ]
    before = [dict(vars(module)) for module in modelling]
    try:
        yield
    finally:
        for module, names in zip(modelling, before, strict=True):
            vars(module).update(names)


def tried(case: Case, workshop: Workshop, gpu: GPU) -> dict[str, Any]:
    """The record of one case, or why there is none. Whatever it held is given back."""
    record: dict[str, Any] = {"name": case.name, **dataclasses.asdict(case)}
    try:
        with patches_undone():
            record |= measure(case, workshop, gpu)
    except torch.OutOfMemoryError:
        record["failed"] = "out of memory"
    except Exception as error:  # one case that breaks must not cost the others their turn
        record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        record["left_behind"] = torch.cuda.memory_allocated()
    return record


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
    device, gpu = start_processes(None).device, this_gpu()
    result: dict[str, Any] = {"machine": machine(device), "shape": arguments.shape, "gpu": dataclasses.asdict(gpu)}
    result |= {"warm_up": WARM_UP, "measured": MEASURED, "cases": [], "out_of_time": []}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(SHAPES[arguments.shape], Path(folder))
        print(f"{result['machine']}: scenes and models after {time.perf_counter() - began:.0f} s", flush=True)
        for case in cases(arguments.shape):
            if time.perf_counter() - began > arguments.seconds:
                result["out_of_time"].append(case.name)
                continue
            record = tried(case, workshop, gpu)
            result["cases"].append(record)
            predict(workshop.config(case), record, result["cases"], gpu)
            print(f"{time.perf_counter() - began:4.0f} s  {one_line(record)}", flush=True)
            result["targets"] = judged(result)
            save(result, arguments.out)
    print_targets(result)


if __name__ == "__main__":
    main()
