"""The training loop: next batches, forward, backward, clip, step, schedule, check, log, evaluate, save.

The same loop runs on one process, under DDP and under DeepSpeed, through accelerate. A run resumes exactly: a step's
samples are a function of its number (`stream.py`), and a checkpoint holds everything else that a step depends on.

The host launches the work of a GPU and does not wait for it within a step. What it must know of a step, whether its
gradient was finite and what its log line says, it reads when the next step has been launched, or before a checkpoint.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from gasp_fast.backbones.adapters import cast_once
from gasp_fast.planning.training_setup import Sharding

from . import checkpoints, guards
from .distributed import Processes
from .held_out import HeldOut
from .loader import LoadedBatches
from .log import HostCopy, Meter, RunLog, finite
from .objective import Batch, LearningGuard, Objective
from .saving import CheckpointWriter
from .signals import Interrupted, StopSignals, kept_from_children
from .start_up import StartUp
from .state import TrainState
from .stream import Share

# Reasons to stop that are no signals.
UNSAVED = 1000  # a checkpoint could not be written
LOW_DISK = 999  # the disk is nearly full: what has been trained must be saved while it fits


@dataclass(frozen=True)
class Launched:
    """A step whose numbers the host has not read yet."""

    step: int
    micro_batches: Sequence[Batch]
    learning_rate: float
    grad_norm: HostCopy | None  # None: DeepSpeed computed none
    sums: HostCopy | None  # of the meter; None: the step has no log line
    stop: (
        HostCopy  # why a process wants to stop: a signal that it has received, `UNSAVED` or `LOW_DISK`; 0: it does not
    )


class TrainingLoop:
    """Trains an `Objective`."""

    def __init__(
        self,
        objective: Objective,
        share: Share,
        steps: int,
        processes: Processes,
        deepspeed: dict[str, Any] | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        config = objective.config
        set_seed(config.train.seed)
        self.objective, self.config, self.stream = objective, config, objective.stream
        self.share = share
        self.steps = steps
        self.processes = processes
        self.signals = StopSignals() if signals is None else signals
        self.zero_stage = Sharding.of(deepspeed).stage
        self.out = Path(config.run.out)
        self.state = TrainState(objective, share, steps, processes, deepspeed)
        self.meter = Meter(objective.counts, objective.terms, processes.device)
        self.held_out = HeldOut(objective, processes)
        self.launched: list[Launched] = []  # at most two steps, the last ones
        self.bad_steps = 0  # steps so far whose gradient was not finite
        self.skipped = 0  # samples of all processes so far that could not be used and were replaced
        self.learning: LearningGuard | None = None  # only in the first steps of a new run
        self.scores: list[float] = []  # of each log line since the last checkpoint
        self.writer = CheckpointWriter(config, processes)
        self.facts = objective.facts() if processes.first else {}

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, resume: Path | None = None, start_up: StartUp | None = None) -> None:
        """Train to the last step, from the beginning or from a checkpoint. Reports `start_up` after the first step.

        Raises `Interrupted` after the step in which a signal was read, when the checkpoint of that step is complete.
        """
        done, batches = self.begin(resume)
        stop, step = 0, done
        self.signals.step_in_hand = True
        with (
            batches,
            RunLog(self.objective, self.steps, done, resume, self.state.accelerator) as log,  # fmt: skip
            self.writer,
        ):
            last = done if self.held_out.out_of_patience else self.steps
            for step in range(done + 1, last + 1):
                stop = self.take(step, batches, log, (start_up or StartUp()) if step == done + 1 else None)
                ended = step == self.steps or self.held_out.out_of_patience
                log.interrupted = bool(stop) and not ended
                if stop or ended:
                    break
        if log.interrupted:
            self.processes.barrier()  # a launcher ends the other ranks as soon as one has ended
            saved_as, name = self.out / f"checkpoint-{step}", signal.Signals(stop).name
            raise Interrupted(f"step {step}: {name}; saved {saved_as}; continue with the same command")
        if step < self.steps and self.processes.first:
            print(f"gasp_fast.train: {self.held_out.last_words(step, self.out)}", file=sys.stderr, flush=True)

    def take(self, step: int, batches: LoadedBatches, log: RunLog, start_up: StartUp | None) -> int:
        """A step and all that belongs to it: checks, log lines, evaluation, checkpoint. `start_up`: of the first step.

        Returns the signal with which to end the run; 0: none.
        """
        micro_batches = self.next_step(step, batches)
        log.skipped.add(self.meter.add_loading(batches))
        saved = step % self.config.run.save_every == 0 or step == self.steps
        evaluated = self.held_out.due(step, self.steps)
        if start_up is not None:
            self.objective.check_first(micro_batches[0])
            start_up.add("data")
        self.launched.append(self.train_step(step, micro_batches))
        log.progress(step)
        alone_and_stopped = self.processes.world_size == 1 and self.why_stop()
        at_once = start_up is not None or saved or evaluated or alone_and_stopped
        stop = self.finish(log, waiting=0 if at_once else 1)
        if start_up is not None:
            start_up.add("first step")
            log.note(str(start_up))
        self.check_learning(step)
        if stop:
            self.finish(log, waiting=0)
        if stop == UNSAVED:
            self.writer.finish()  # raises what kept the checkpoint from being written
        if evaluated:
            saved |= self.evaluate(step, log)
        if saved or stop:
            self.save(step)
        if stop == LOW_DISK:
            self.writer.finish()  # like `save`, raises if it still is
        return 0 if stop == LOW_DISK else stop

    def train_step(self, step: int, micro_batches: Sequence[Batch]) -> Launched:
        """Launch one optimiser step, and the copies of its numbers to the host."""
        shares = self.shares_of_step(step, micro_batches)
        with cast_once(self.objective.model, self.objective.dtype):
            for number, (batch, share) in enumerate(zip(micro_batches, shares, strict=True), 1):
                self.forward_backward(batch, share, last=number == len(micro_batches))
        learning_rate, grad_norm = self.update()
        logged = step == 1 or step % self.config.run.log_every == 0 or step == self.steps
        sums = self.meter.take() if logged else None
        why = self.why_stop()
        if logged and self.processes.first and not why and guards.disk_is_low(self.config.run):
            why = LOW_DISK
        stop = HostCopy(self.processes.largest(why))
        return Launched(step, micro_batches, learning_rate, grad_norm, sums, stop)

    def why_stop(self) -> int:
        """Why this process wants to stop: a signal that it has received, or `UNSAVED`; 0: it does not."""
        return UNSAVED if self.writer.failed else self.signals.received

    def shares_of_step(self, step: int, micro_batches: Sequence[Batch]) -> Tensor:
        """The shares of this process's micro-batches in what the losses are averaged over, [micro-batches, C]."""
        counts = torch.stack([batch["counts"] for batch in micro_batches])
        counts = counts.to(self.processes.device, non_blocking=True)
        totals = self.processes.total(counts.sum(0))  # [C], of all processes
        if self.processes.first:
            self.meter.begin_step(totals, self.share.useful_share(step - 1))
        return torch.where(totals > 0, counts / totals, 0).float()

    def forward_backward(self, batch: Batch, shares: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch. Below ZeRO-2, gradients are exchanged after the last one of a step."""
        state, objective = self.state, self.objective
        tokens, flops = objective.tokens(batch), objective.flops(batch)
        batch = {name: value.to(self.processes.device, non_blocking=True) for name, value in batch.items()}
        state.accelerator.sync_gradients = last
        deferred = not last and state.deepspeed is None
        with state.accelerator.no_sync(state.engine) if deferred else nullcontext():
            outputs = state.engine(**batch, shares=shares)
            self.meter.add(outputs["loss"], objective.logged(outputs, batch), tokens, flops)
            if self.learning is not None:
                self.learning.add(outputs, batch)
            # The losses add up to the step's. But accelerate or DeepSpeed divides each by a number of micro-batches,
            # and DDP or DeepSpeed takes the mean of the processes' gradients.
            divided = state.accelerator.gradient_accumulation_steps * self.processes.world_size
            state.accelerator.backward(outputs["loss"] * divided)  # DeepSpeed also clips and steps, after the last one

    def update(self) -> tuple[float, HostCopy | None]:
        """Clip the gradient, step the optimiser and the schedule. A gradient that is not finite changes no weight.

        Returns the learning rate, and the norm of the gradient before clipping. DeepSpeed has clipped and stepped in
        `backward`, or skipped the step: there, only the schedule is stepped here.
        """
        state = self.state
        norm = state.accelerator.clip_grad_norm_(state.engine.parameters(), self.config.train.clip)  # of all processes
        if norm is not None:
            norm = torch.as_tensor(norm)  # DeepSpeed may return a number
            state.skip_unless_finite(norm)
        state.optimizer.step()
        learning_rate = float(state.schedule.get_last_lr()[0])
        if not state.accelerator.optimizer_step_was_skipped:
            state.schedule.step()
        state.optimizer.zero_grad()
        return learning_rate, None if norm is None else HostCopy(norm)

    # ---- start, log, save -------------------------------------------------------------------------------------------

    def begin(self, resume: Path | None = None) -> tuple[int, LoadedBatches]:
        """Load the checkpoint, if any. Returns the number of completed steps, and the micro-batches of those left."""
        done, held_out = 0, None
        if resume is None:
            self.learning = self.objective.learning_guard()
        else:
            self.state.load(resume)
            about = checkpoints.read_about(resume)
            done, self.bad_steps, self.skipped = about["step"], about["bad_steps"], about.get("skipped", 0)
            held_out = about.get("held_out")
            self.meter.restore(about["unlogged"], self.processes.rank, self.processes.world_size)
        self.held_out.begin(held_out)
        self.share = replace(self.share, deal=self.objective.deal(self.share, self.processes))
        pin = self.processes.device.type == "cuda"
        loader = self.objective.loader(self.share, self.steps, done, pin)
        with kept_from_children():
            # Half of the time: what was not read must be named before the other processes give up waiting for this one.
            batches = LoadedBatches(loader, self.stream, self.config.run.timeout / 2)
        if resume is not None:  # not earlier: the loader draws a random number when it starts
            self.state.load_random_state(resume)
        return done, batches

    def next_step(self, step: int, batches: LoadedBatches) -> list[Batch]:
        """The micro-batches of a step."""
        return [next(batches) for _ in self.share.micro_batches(step - 1)]

    def try_step(self) -> dict[str, Any]:
        """Take the first step and return what would be logged. Writes no file."""
        _, batches = self.begin()
        with batches:
            micro_batches = self.next_step(1, batches)
        self.objective.check_first(micro_batches[0])
        return self.record_of(self.train_step(1, micro_batches))

    def finish(self, log: RunLog, waiting: int) -> int:
        """Read the numbers of the launched steps, but for the last `waiting` ones, and write their log lines.

        Returns why a process wanted to stop by the last of them; 0: none did. It is the same on all processes.
        """
        stop = 0
        while len(self.launched) > waiting:
            launched = self.launched.pop(0)
            start = time.perf_counter()
            record = self.record_of(launched)
            stop = int(launched.stop.read())
            self.meter.add_device_wait(time.perf_counter() - start)
            if launched.sums is not None:
                if (score := self.objective.score(record)) is not None:
                    self.scores.append(score)
                log.write(record)
                self.skipped += sum(record["skipped"].values())
                guards.check_skipped(self.config, self.skipped, launched.step)
        return stop

    def record_of(self, launched: Launched) -> dict[str, Any]:
        """What a step's log line says, as far as it has one. Reports the step if its gradient was not finite."""
        norm = None if launched.grad_norm is None else float(launched.grad_norm.read())
        if norm is not None and not math.isfinite(norm):
            self.report_bad_step(launched.step, launched.micro_batches)
        means = {} if launched.sums is None else self.meter.means(launched.sums)
        return {"step": launched.step, **means, "lr": launched.learning_rate, "grad_norm": finite(norm)}

    def check_learning(self, step: int) -> None:
        if self.learning is not None and step == self.learning.steps:
            self.learning.check()
            self.learning = None

    def evaluate(self, step: int, log: RunLog) -> bool:
        """Evaluate on held-out sequences; whether to save: the best model so far, and the last one."""
        metrics = self.held_out.evaluate(step)
        self.meter.start += metrics["seconds"]  # these are no time of a step
        log.write_held_out(step, metrics)
        return (metrics["best"] and self.config.run.keep_best) or self.held_out.out_of_patience

    def report_bad_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Name the samples of a step without a finite gradient; stop the run after too many such steps."""
        self.bad_steps += 1
        rank = self.processes.rank
        micro_batch_positions = self.share.micro_batches(step - 1)
        sources = [self.stream.describe(position) for positions in micro_batch_positions for position in positions]
        cause = f"step {step}: the gradient is not finite ({', '.join(sources)} on process {rank})"
        batch_file = self.out / f"bad-step-{step}-process-{rank}.pt"
        guards.check_bad_steps(self.config.run, self.bad_steps, cause, micro_batches, batch_file)
        more = self.config.run.bad_steps - self.bad_steps + 1
        print(f"gasp_fast.train: {cause}; skipped; the run stops after {more} more", file=sys.stderr, flush=True)

    def save(self, step: int) -> None:
        """Write `checkpoint-STEP`, then remove those that are no longer needed."""
        about = {
            "step": step,
            "ranks": self.processes.world_size,
            "zero_stage": self.zero_stage,
            "mode": self.config.train.mode,
            "batch_size": self.config.train.batch_size,
            "score": sum(self.scores) / len(self.scores) if self.scores else None,
            "bad_steps": self.bad_steps,
            "skipped": self.skipped,
            "held_out": self.held_out.state(),
            "unlogged": self.meter.state(),
            **self.state.facts(),
            **self.facts,
        }
        self.writer.save(step, self.state.snapshot(), about)
        self.scores = []
