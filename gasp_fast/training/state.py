"""What a training step changes: the distributed model, its optimiser, its schedule; and how they are saved."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from gasp_fast.planning.training_setup import Sharding

from . import checkpoints, earlier_checkpoints, random_state
from .distributed import Processes, fill_deepspeed, make_accelerator
from .divided_files import Dealt, deal, write
from .objective import Objective, Weights
from .optim import rate_change
from .optimizer_state import gathered_state, read_state, without_state, write_state
from .random_state import gathered_random_states
from .same_run import continued_schedule
from .stream import Share


class TrainState:
    """A model, prepared for training on one process, under DDP or under DeepSpeed.

    A step calls `engine`: the model itself, or DDP's or DeepSpeed's wrapper of it.
    """

    def __init__(
        self,
        objective: Objective,
        share: Share,
        steps: int,
        processes: Processes,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        self.objective, self.processes, self.deepspeed = objective, processes, deepspeed
        self.config, self.model = config, model = objective.config, objective.model
        if deepspeed is None:
            model.to(processes.device)
        else:
            self.deepspeed = fill_deepspeed(deepspeed, share, config.train.clip, objective.hidden_size)
            objective.prepare_for_deepspeed()
        self.accelerator = make_accelerator(config, processes, share, self.deepspeed, objective.may_skip_weights)
        self.engine, self.optimizer = self.accelerator.prepare(model, objective.make_optimizer())
        self.engine.train()
        # The schedule is not prepared: accelerate would step it once for each process.
        self.rates = objective.schedule(steps)
        # The first `LambdaLR` takes the optimiser's rates for the peak and notes them there, for a later one.
        self.schedule = LambdaLR(self.optimizer, self.rates)

    def skip_unless_finite(self, norm: Tensor) -> None:
        """Let the next step of AdamW change nothing if the gradient's norm is not finite. DeepSpeed does so by itself.

        The norm stays on the device: a fused optimiser reads `found_inf` there, which torch's GradScaler sets as well.
        """
        if self.deepspeed is None:
            optimizer: Any = self.optimizer.optimizer
            optimizer.found_inf = (~norm.isfinite()).float()

    def snapshot(self) -> Snapshot:
        """What a checkpoint holds of this state. All processes must call, and `write` it.

        It is a copy in host memory, which no later step changes, and of which every process has a share. What is not
        divided among GPUs need not be copied where training waits until it is written.
        """
        processes = self.processes
        in_place = self.deepspeed is None and not self.config.run.save_async
        weights = self.objective.gather_weights(processes, in_place)
        state = gathered_state(self.model, self.optimizer.optimizer)
        optimizer = deal(state, processes.rank, processes.world_size, in_place)
        return Snapshot(self.objective, weights, optimizer, gathered_random_states(processes))

    def facts(self) -> dict[str, Any]:
        """What about.json says of it."""
        return {
            "schedule": self.schedule.last_epoch,
            "learning_rate": float(self.schedule.get_last_lr()[0]),
            "warmup": self.rates.warmup,
            "cosine_begins": self.rates.cosine_begins,
            "cosine_share": self.rates.cosine_share,
            "lowest": self.rates.lowest,
            "without_state": without_state(self.model, self.optimizer.optimizer),
        }

    def load(self, folder: Path) -> None:
        """Continue from the optimiser and the schedule in a checkpoint, whose weights the model already has.

        Rates and weight decay are those of the configuration. The random number generators follow later
        (`load_random_state`): the loader draws from them first.
        """
        about = checkpoints.read_about(folder)
        if "schedule" in about:
            with checkpoints.readable(folder / "optimizer-1.safetensors"):
                unknown: list[str] | None = (
                    None if self.config.train.mode == "full" else []
                )  # in checkpoints of earlier versions
                read_state(folder, self.model, self.optimizer.optimizer, about.get("without_state", unknown))
            done, stopped = about["schedule"], about["learning_rate"]
        else:
            done, stopped = self._load_earlier(folder)
        self.rates = continued_schedule(self.objective, self.rates.steps, folder)
        self.schedule = LambdaLR(self.optimizer, self.rates, last_epoch=done - 1)
        if self.processes.first and (line := rate_change(self.schedule, stopped)):
            print(line, file=sys.stderr)

    def _load_earlier(self, folder: Path) -> tuple[int, float]:
        """The steps that the schedule has counted, and the learning rate after them."""
        processes, full = self.processes, self.config.train.mode == "full"
        earlier_checkpoints.check_division(folder, processes.world_size, Sharding.of(self.deepspeed).stage)
        settings = [{**group} for group in self.optimizer.param_groups]
        if self.deepspeed is not None:
            earlier_checkpoints.read_zero_state(folder, self.engine, all_parameters=full)
        else:
            # A single process reads into CPU memory, which is larger. Several on a node would each hold a copy there.
            place = processes.device if processes.world_size > 1 else "cpu"
            earlier_checkpoints.read_plain_state(folder, self.optimizer, place, complete=not full)
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({name: value for name, value in setting.items() if name != "params"})
        return earlier_checkpoints.read_schedule(folder)

    def load_random_state(self, folder: Path) -> None:
        if "schedule" in checkpoints.read_about(folder):
            with checkpoints.readable(folder / random_state.FILE):
                random_state.read_random_state(folder, self.processes)
        else:
            earlier_checkpoints.read_random_state(folder, self.processes)


@dataclass(frozen=True)
class Snapshot:
    """The state of training after a step, or a process's share of it."""

    objective: Objective
    weights: Weights
    optimizer: Dealt
    random: list[random_state.State]

    def write(self, folder: Path, group: dist.ProcessGroup | None, first: bool) -> None:
        """Write a share; the first process also writes what is not divided. All of `group` must call."""
        if self.weights.whole is not None:
            write(folder, self.weights.whole, group)
        write_state(folder, self.optimizer, group, first)
        if first:
            self.objective.write_weights(folder, self.weights)
            random_state.write_random_states(folder, self.random)
