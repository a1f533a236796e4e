"""Writes checkpoints as earlier versions did: the optimiser as training divided it, and pickled states."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch

from gasp_fast.training.weights import gather_weights, write_weights


def save_as_earlier(self: Any, step: int) -> None:
    """In place of `TrainingLoop.save`."""
    state, processes = self.state, self.processes
    folder = self.out / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    processes.barrier()
    weights = gather_weights(self.objective.model, processes)
    if state.deepspeed is not None:
        state.engine.save_checkpoint(str(folder), exclude_frozen_parameters=self.config.train.mode == "lora")
    elif processes.first:
        torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")
    unlogged = self.meter.state()
    if processes.first:
        write_weights(self.objective.model, folder, weights)
        if weights.whole is not None:  # of one process
            self.objective.model.model.save_pretrained(folder)
        torch.save(state.schedule.state_dict(), folder / "scheduler.pt")
        about = {
            "step": step,
            "ranks": processes.world_size,
            "zero_stage": self.zero_stage,
            "mode": self.config.train.mode,
            "batch_size": self.config.train.batch_size,
            "score": None,
            "bad_steps": 0,
            "unlogged": unlogged,
        }
        (folder / "about.json").write_text(json.dumps(about))
    generators = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    name = "rng_state.pth" if processes.world_size == 1 else f"rng_state_{processes.rank}.pth"
    torch.save(generators, folder / name)
    processes.barrier()
