"""Reads the state in checkpoints of earlier versions, which was saved as training divided it:

    optimizer.pt or global_stepN/    optimiser; the latter is DeepSpeed's, for the same processes and stage only
    scheduler.pt                     learning rate schedule
    rng_state*.pth                   random number generators of each process

Nothing is unpickled but tensors and containers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load

from .checkpoints import read_about, readable
from .distributed import Processes


def check_division(folder: Path, world_size: int, stage: int) -> None:
    """Check that the run is divided as the checkpoint was."""
    about = read_about(folder)
    for name, value in {"ranks": world_size, "zero_stage": stage}.items():
        # Without ZeRO nothing is split, and any number of processes can resume.
        if about[name] != value and not (name == "ranks" and stage == about["zero_stage"] == 0):
            raise ValueError(
                f"{folder} is of an earlier version and was written with {name} = {about[name]}, this run has {value}; "
                "use the same value to resume, or another run.out to begin anew"
            )


def read_zero_state(folder: Path, engine: Any, all_parameters: bool) -> None:
    """Weights and optimiser of a DeepSpeed engine. Without `all_parameters` the frozen ones are not stored."""
    with readable(path := folder / "latest"):
        tag = path.read_text().strip()  # the name of DeepSpeed's folder
    with readable(folder / tag), loads_only_tensors():
        loaded, _ = engine.load_checkpoint(str(folder), tag, load_module_strict=all_parameters)
        if loaded is None:
            raise ValueError("DeepSpeed found no state in it")


def read_plain_state(folder: Path, optimizer: torch.optim.Optimizer, place: str | torch.device, complete: bool) -> None:
    """Without DeepSpeed: the optimiser alone, through `place`. With `complete`, every parameter must have a state."""
    with readable(path := folder / "optimizer.pt"):
        optimizer.load_state_dict(torch.load(path, place, weights_only=True))
        # `load_state_dict` takes the state as it is. A parameter that is never used has none.
        for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state.get(parameter, {})
            if not state and not complete:
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state.get(name)
                if not torch.is_tensor(moment) or moment.shape != parameter.shape:
                    raise ValueError(f"{name} of parameter {number} is missing or has another shape")
            if "step" not in state:
                raise ValueError(f"step of parameter {number} is missing")


def read_schedule(folder: Path) -> tuple[int, float]:
    """The steps that the schedule has counted, and the learning rate after them."""
    with readable(path := folder / "scheduler.pt"):
        state = torch.load(path, weights_only=True)
        return int(state["last_epoch"]), float(state["_last_lr"][0])


def read_random_state(folder: Path, processes: Processes) -> None:
    """Restore the generators of this process. They stay if another number of processes saved none for it."""
    path = folder / ("rng_state.pth" if processes.world_size == 1 else f"rng_state_{processes.rank}.pth")
    if not path.exists() and read_about(folder)["ranks"] != processes.world_size:
        return
    with readable(path):
        state = load(path)  # with `weights_only`
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.random.set_rng_state(state["cpu"])
        if processes.device.type == "cuda":
            cuda = state["cuda"]  # in older ones a list, one for each GPU
            torch.cuda.set_rng_state(cuda[processes.device.index] if isinstance(cuda, list) else cuda, processes.device)


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
