"""The usual step without geometry: transformers' `Trainer`, peft and gradient checkpointing.

This is what fine-tuning tools run: bf16 autocast, adapters in fp32, non-reentrant checkpointing, the model's own loss.
The base model, the adapted modules and the batches are those of our step, without tracks; nothing of gasp_fast runs in
it. It has a process of its own, because accelerate and Liger change settings of a whole process, and takes a step
whenever `step.py` asks for one.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_profile import profiled, seconds_by_part, what_ran
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from gasp_fast.backbones import load_backbone
from gasp_fast.training.distributed import quiet_libraries
from gasp_fast.training.model import SupervisedModel

STEPS = 10_000  # more than anyone asks for
ROW = 4  # steps that are started one after another, as in a run, which waits for the device in log lines only


@dataclass(frozen=True, kw_only=True)
class PlainRun:
    """What the process trains."""

    source: str  # folder of the model
    rank: int  # of the adapters
    alpha: int
    batches: str  # file of the micro-batches of a step
    clip: float
    learning_rate: float
    threads: int  # of the CPU, as many as ours has


def save_batches(batches: list[dict[str, Any]], path: Path) -> None:
    """Write what the model itself takes of each micro-batch: tensors, but for those that our loss reads."""

    def inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        not_inputs = ("visual_positions", "counts")
        return {name: v for name, v in batch.items() if torch.is_tensor(v) and name not in not_inputs}

    torch.save([inputs(batch) for batch in batches], path)


class PlainTrainer:
    """The process, as `step.py` sees it."""

    def __init__(self, run: PlainRun) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_train, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str) -> dict[str, Any]:
        """Let it do "step", "profile" (a step), "row" (`ROW` steps), or "rest" (free what it does not need).

        Returns what it measured.
        """
        self.pipe.send(what)
        try:
            answer: dict[str, Any] = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the Trainer's process ended with {self.process.exitcode}") from None
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _train(pipe: Any, run: PlainRun) -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a Trainer would use all GPUs that it sees
    quiet_libraries()
    try:
        torch.set_num_threads(run.threads)
        with tempfile.TemporaryDirectory() as folder:
            model = _build(run)
            trainer = _SameBatches(torch.load(run.batches), model.model, _arguments(run, folder))
            trainer.add_callback(_Turns(pipe, model))
            trainer.train()
    except torch.OutOfMemoryError:
        pipe.send({"failed": "out of memory"})
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


def _build(run: PlainRun) -> SupervisedModel:
    """The adapted model. `SupervisedModel` only names its parts for the profile; its forward pass is never called."""
    from peft import LoraConfig, get_peft_model

    backbone = load_backbone(run.source)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = AutoModelForImageTextToText.from_config(backbone.config, dtype=torch.bfloat16)
        lora = LoraConfig(r=run.rank, lora_alpha=run.alpha, target_modules=backbone.lora_targets, task_type="CAUSAL_LM")
        return SupervisedModel(backbone, get_peft_model(base, lora), None)


def _arguments(run: PlainRun, folder: str) -> TrainingArguments:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    # The name since transformers 5.20, and the one before.
    kind = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    checkpointing = {kind: True, f"{kind}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,  # a micro-batch, however many sequences it holds
        gradient_accumulation_steps=len(torch.load(run.batches, mmap=True)),
        learning_rate=run.learning_rate,
        max_grad_norm=run.clip,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **checkpointing,  # type: ignore[arg-type]
    )


class _SameBatches(Trainer):
    """Repeats the micro-batches of one step."""

    def __init__(self, batches: list[dict[str, Any]], model: Any, arguments: TrainingArguments) -> None:
        super().__init__(model=model, args=arguments)
        gpu = torch.cuda.is_available()
        self.batches = [{n: v.pin_memory() if gpu else v for n, v in batch.items()} for batch in batches]

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        repeated = self.batches * (STEPS // len(self.batches))
        return DataLoader(repeated, batch_size=1, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]


class _Turns(TrainerCallback):
    """Waits before each step for a request, and measures from the request to the end of the step."""

    def __init__(self, pipe: Any, model: SupervisedModel) -> None:
        self.pipe, self.model = pipe, model
        self.profile: Any = None
        self.stack = ExitStack()
        self.clock = Clock()
        self.left = 1  # steps until it answers

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.left -= 1
        if self.left > 0:
            return
        answer = {**self.clock.read(), "peak_memory": peak_memory()}
        self.stack.close()
        if self.profile is not None:
            parts, attention = seconds_by_part(self.profile)
            answer |= {"seconds_by_part": parts, "attention_operations": attention, **self.ran}
            self.profile = None
        self.pipe.send(answer)
        self.wait()

    def wait(self) -> None:
        while (request := self.pipe.recv()) == "rest":
            empty_cache()
            self.pipe.send({})
        self.left = ROW if request == "row" else 1
        if request == "profile":
            self.ran = self.stack.enter_context(what_ran(self.model))
            self.profile = self.stack.enter_context(profiled(self.model))
        reset_peak()
        self.clock = Clock()


# ---- time and memory ------------------------------------------------------------------------------------------------


class Clock:
    """Seconds since it was made. Other work on the machine changes them; it changes those of the process little."""

    def __init__(self) -> None:
        synchronize()
        self.began, self.process = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        synchronize()
        return {"seconds": time.perf_counter() - self.began, "process_seconds": time.process_time() - self.process}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Of this process since `reset_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
