"""The training loop: transformers' `Trainer`, told what a step is, what to write down and when to stop.

Knows how the other rooms of this folder fit together; each idea is explained in its own room. What is inherited is
the loop itself, accumulation, mixed launchers (one process, DDP, DeepSpeed) and the services that `report_to` names.
What is replaced is stated method by method: the stream of batches, the optimiser, the log, and checkpoints, which
appear whole or not at all and resume exactly.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import checkpoints, guards
from .config import TrainConfig
from .ending import conclude
from .log import Bar, Meter, RunLog, finite, scalars
from .model import SupervisedModel, trained_groups
from .optim import make_optimizer
from .processes import Processes, zero_stage
from .stream import SampleStream, Share, make_loader
from .throughput import OperationCount, sequences_of_batch


class GaspTrainer(Trainer):
    """Trains a `SupervisedModel` on a `SampleStream`."""

    def __init__(
        self,
        config: TrainConfig,
        model: SupervisedModel,
        stream: SampleStream,
        share: Share,
        steps: int,
        processes: Processes,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.stream, self.share, self.steps = config, stream, share, steps
        self.processes, self.stage, self.out = processes, zero_stage(deepspeed), Path(config.run.out)
        self.supervised = model
        self.operations = OperationCount(config, model)
        self.meter = Meter(0 if model.supervision is None else len(model.supervision.layers), processes.device)
        self.bad_steps = guards.BadSteps(config.run, processes.rank)
        self.learning: guards.LearningGuard | None = None
        self.scores: list[float] = []  # of each logged step since the last checkpoint
        self.current: list[dict[str, Any]] = []  # this step's batches, as they came from the loader
        self.saw_matches, self.useful = False, 0.0
        self.answers = torch.zeros((), dtype=torch.long, device=processes.device)  # labelled tokens so far
        super().__init__(model=model, args=self._arguments(config, steps, share, processes, deepspeed))
        self.model_accepts_loss_kwargs = False  # each micro-batch's loss is a mean; Trainer divides by accumulation
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepCallback(self))

    @staticmethod
    def _arguments(
        config: TrainConfig, steps: int, share: Share, processes: Processes, deepspeed: dict[str, Any] | None
    ) -> TrainingArguments:
        train, run = config.train, config.run
        return TrainingArguments(
            output_dir=run.out,
            per_device_train_batch_size=share.micro_batch_size,
            gradient_accumulation_steps=share.accumulation,
            max_steps=steps,
            learning_rate=train.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(train.warmup * steps),
            weight_decay=train.weight_decay,
            max_grad_norm=train.clip,
            seed=train.seed,
            logging_steps=run.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=run.save_every,
            report_to=list(run.report_to),
            use_cpu=processes.device.type == "cpu",
            ddp_backend="gloo" if processes.device.type == "cpu" and processes.ranks > 1 else None,
            # Every trained weight takes part in every step (`modality.py`), but for those that a model itself never
            # uses, of which a fully trained one may have some.
            ddp_find_unused_parameters=train.mode == "full",
            ddp_broadcast_buffers=False,
            deepspeed=deepspeed,
            remove_unused_columns=False,
            disable_tqdm=True,
            log_level="warning",
        )

    # ---- batches ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The whole run is one epoch to Trainer, which skips the batches before a resumed step without loading them."""
        pin = self.processes.device.type == "cuda"
        return make_loader(self.settings.data, self.stream, self.supervised.backbone, self.share, self.steps, pin)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.current and batches:
            guards.check_positions(self.supervised, batches[0])
        self.current = batches
        return batches, None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.processes.device
        token, fixed = self.supervised.backbone.visual_token_id, self.operations.shape.frame_tokens
        self.useful = self.operations(sequences_of_batch(inputs, token, fixed))  # while they are still on the CPU
        return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}

    # ---- a step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        matches = inputs["matches"]
        outputs = model(**inputs)
        self.meter.add(outputs, len(matches), inputs["input_ids"].numel(), self.useful)
        self.saw_matches |= len(matches) > 0
        self.answers += outputs["answers"]
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(trained_groups(self.supervised), self.settings.train)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm is of the gradient of all processes, so all of them skip the same steps."""
        norm = super()._clip_grad_norm(model)
        if norm is None or math.isfinite(float(norm)):
            return norm
        model.zero_grad(set_to_none=True)  # AdamW passes over what has no gradient; DeepSpeed has skipped already
        step = self.state.global_step
        first = step * self.share.accumulation
        positions = [p for batch in range(first, first + self.share.accumulation) for p in self.share.positions(batch)]
        told = self.bad_steps.skip(step + 1, self.current, [self.stream.describe(p) for p in positions])
        print(f"gasp_fast.train: {told}", file=sys.stderr, flush=True)
        return norm

    # ---- the log ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own numbers are its loss, the gradient's norm and the rate; the rest comes from the meter."""
        if "grad_norm" not in logs:  # the summary at the end
            return
        record = {"step": self.state.global_step, **self.meter.read()}
        record |= {"lr": logs["learning_rate"], "grad_norm": finite(float(logs["grad_norm"]))}
        score = score_of(record)
        self.scores += [] if score is None else [score]
        if self.processes.first:
            self.run_log.write(record)
            self.bar.update(self.state.global_step, record)
        # Not kept in Trainer's own history, which would be written out anew with every checkpoint.
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, scalars(record))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = self.out / f"checkpoint-{self.state.global_step}"
        partial = checkpoints.partial_of(folder)
        if self.processes.first:
            guards.check_disk(self.settings.run)
            checkpoints.sweep(self.out)
            partial.mkdir(parents=True)
        self.processes.barrier()
        checkpoints.write_weights(self.supervised, partial, self.processes.first)
        self._save_optimizer_and_scheduler(str(partial))
        self._save_rng_state(str(partial))
        score = sum(self.scores) / len(self.scores) if self.scores else None
        self.scores = []
        unlogged = self.meter.state()
        if score is not None and (self.state.best_metric is None or score > self.state.best_metric):
            self.state.best_metric, self.state.best_model_checkpoint = score, str(folder)
        self.processes.barrier()
        if self.processes.first:
            self.state.save_to_json(str(partial / "trainer_state.json"))
            checkpoints.write_about(
                partial,
                step=self.state.global_step,
                ranks=self.processes.ranks,
                zero_stage=self.stage,
                mode=self.settings.train.mode,
                batch_size=self.settings.train.batch_size,
                score=score,
                bad_steps=self.bad_steps.seen,
                unlogged=unlogged,
            )
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            run = self.settings.run
            checkpoints.rotate(self.out, run.keep, self.state.best_model_checkpoint if run.keep_best else None)
        self.processes.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """DeepSpeed would save the frozen weights, too, which are the base model's."""
        engine, schedule = cast(Any, self.model_wrapped), cast(Any, self.lr_scheduler)
        if self.is_deepspeed_enabled:
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=self.settings.train.mode == "lora")
            if self.args.should_save:
                torch.save(schedule.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.read_weights(self.supervised, Path(resume_from_checkpoint))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Trainer would ask DeepSpeed for all weights back; frozen ones were not saved."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                engine = cast(Any, self.model_wrapped)
                engine.load_checkpoint(resume_from_checkpoint, load_module_strict=self.settings.train.mode == "full")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, resume: Path | None) -> None:
        """Train from the beginning, or from a checkpoint on."""
        done = 0
        if resume is not None:
            about = checkpoints.read_about(resume)
            done, self.bad_steps.seen = about["step"], about["bad_steps"]
            self.meter.restore(about["unlogged"], self.processes.rank, self.processes.ranks)
        console = Console(stderr=True)
        if self.processes.first:
            self.run_log = RunLog(self.out, done)
            self.bar = Bar(self.steps, done, self.settings.run.progress, console)
        try:
            self.train(resume_from_checkpoint=None if resume is None else str(resume))
        finally:
            if self.processes.first:
                self.bar.stop()
        if self.processes.first:
            conclude(self.out, console, self.settings.run.progress)


def score_of(record: dict[str, Any]) -> float | None:
    """By what the best checkpoint is chosen: PCK over all layers, or the language loss where there are no heads."""
    pck = [value for value in record["pck_per_layer"] if value is not None]
    if pck:
        return float(sum(pck) / len(pck))
    return None if record["pck_per_layer"] or record["lm"] is None else -float(record["lm"])


class _StepCallback(TrainerCallback):
    """Moves the bar, has the last step logged whatever `log_every` says, and looks whether anything learns."""

    def __init__(self, trainer: GaspTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.trainer.learning = guards.LearningGuard(self.trainer.supervised)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        control.should_log |= state.global_step == state.max_steps
        if trainer.processes.first:
            trainer.bar.update(state.global_step)
        if trainer.learning is not None and state.global_step == guards.LEARNING_STEPS:
            saw_answers = trainer.settings.loss.lm_weight > 0 and bool(trainer.answers)
            trainer.learning.check(state.global_step, trainer.saw_matches, saw_answers)
            trainer.learning = None
