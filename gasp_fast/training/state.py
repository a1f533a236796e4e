"""What a training step changes: the distributed model, its optimiser, its schedule; and how they are saved."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from . import checkpoints
from .config import TrainConfig
from .distributed import Processes, fill_deepspeed, make_accelerator
from .model import SupervisedModel
from .optim import make_optimizer, rate_change, trained_groups
from .stream import Share
from .weights import read_weights, write_weights


class TrainState:
    """A model, prepared for training on one process, under DDP or under DeepSpeed.

    A step calls `engine`: `model` itself, or DDP's or DeepSpeed's wrapper of it.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: SupervisedModel,
        share: Share,
        steps: int,
        processes: Processes,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.model, self.processes, self.deepspeed = config, model, processes, deepspeed
        if deepspeed is None:
            model.to(processes.device)
        else:
            self.deepspeed = fill_deepspeed(deepspeed, share, config.train.clip, model.backbone.hidden_size)
            gather_heads_together(model)
        self.accelerator = make_accelerator(config, processes, share, self.deepspeed)
        optimizer = make_optimizer(trained_groups(model), config.train)
        self.engine, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.engine.train()
        # The schedule is not prepared: accelerate would step it once for each process.
        self.steps = steps
        self.schedule = self._schedule()

    def _schedule(self, done: int = 0) -> LambdaLR:
        """The learning rates of the configuration, after so many steps."""
        warmup = math.ceil(self.config.train.warmup * self.steps)
        # The first schedule takes the optimiser's rates for the peak and notes them there, for a later one.
        return get_cosine_schedule_with_warmup(self.optimizer, warmup, self.steps, last_epoch=done - 1)

    def skip_unless_finite(self, norm: Tensor) -> None:
        """Let the next step of AdamW change nothing if the gradient's norm is not finite. DeepSpeed does so by itself.

        The norm stays on the device: a fused optimiser reads `found_inf` there, which torch's GradScaler sets as well.
        """
        if self.deepspeed is None:
            optimizer: Any = self.optimizer.optimizer
            optimizer.found_inf = (~norm.isfinite()).float()

    def save(self, folder: Path) -> None:
        """Write everything but the step's number into `folder`. All processes must call."""
        processes, lora = self.processes, self.config.train.mode == "lora"
        write_weights(self.model, folder, processes.first)
        if self.deepspeed is not None:
            self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=lora)  # those are the base model's
        elif processes.first:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        if processes.first:
            torch.save(self.schedule.state_dict(), folder / "scheduler.pt")
        checkpoints.write_random_state(folder, processes)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, except for the random number generators: the loader draws from them first."""
        processes, lora = self.processes, self.config.train.mode == "lora"
        # Rates and weight decay are those of the configuration, which may have changed them.
        settings = [{**group, "params": None} for group in self.optimizer.param_groups]
        if self.deepspeed is not None:
            with checkpoints.readable(path := folder / "latest"):
                tag = path.read_text().strip()  # the name of DeepSpeed's folder
            with checkpoints.readable(folder / tag), loads_only_tensors():
                loaded, _ = self.engine.load_checkpoint(str(folder), tag, load_module_strict=not lora)
                if loaded is None:
                    raise ValueError("DeepSpeed found no state in it")
        else:
            read_weights(self.model, folder)
            # A single process reads into CPU memory, which is larger. Several on a node would each hold a copy there.
            place = processes.device if processes.world_size > 1 else "cpu"
            with checkpoints.readable(path := folder / "optimizer.pt"):
                self.optimizer.load_state_dict(torch.load(path, place, weights_only=True))
                self._check_moments(all_parameters=lora)
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({name: value for name, value in setting.items() if name != "params"})
        with checkpoints.readable(path := folder / "scheduler.pt"):
            state = torch.load(path, weights_only=True)
            if differing := state.keys() ^ self.schedule.state_dict().keys():
                raise ValueError(f"{min(differing)} is missing or unknown")
            self.schedule = self._schedule(state["last_epoch"])
        if processes.first and (line := rate_change(self.schedule, state["_last_lr"][0])):
            print(line, file=sys.stderr)

    def _check_moments(self, all_parameters: bool) -> None:
        """Check AdamW's state, which `load_state_dict` takes as it is. A parameter that is never used has none."""
        for number, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            state = self.optimizer.state.get(parameter)
            if not state and not all_parameters:
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                moment = (state or {}).get(name)
                if not torch.is_tensor(moment) or moment.shape != parameter.shape:
                    raise ValueError(f"{name} of parameter {number} is missing or has another shape")
            if "step" not in state:
                raise ValueError(f"step of parameter {number} is missing")


@contextmanager
def loads_only_tensors() -> Iterator[None]:
    """Let `torch.load` read tensors, containers and DeepSpeed's own records, but call nothing that a file names.

    DeepSpeed loads its files with `weights_only=False`; torch's environment variable overrules that.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def gather_heads_together(model: nn.Module) -> None:
    """Under ZeRO-3, gather the weights of all heads at once and keep them until their gradients are computed."""
    from deepspeed.utils import set_z3_leaf_modules

    from gasp_fast.supervision.geometric import SupervisedLayers

    if any(isinstance(module, SupervisedLayers) for module in model.modules()):
        set_z3_leaf_modules(model, [SupervisedLayers])
