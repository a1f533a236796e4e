"""Checkpoints of a run: folders `checkpoint-N` that are complete or absent.

    adapter_model.safetensors, adapter_config.json    adapters (train.mode lora)
    model.safetensors …, config.json, processor       all weights (train.mode full): loads with transformers alone
    heads.safetensors                                 correspondence heads, and the temperature if it learns
    optimizer.pt or global_stepN/                     optimiser; the latter is DeepSpeed's
    scheduler.pt                                      learning rate schedule
    rng_state*.pth                                    random number generators of each process
    about.json                                        step, score, how the run was divided, sums not yet logged

All processes write into `.checkpoint-N.partial`; the first one renames it when it is complete.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load

from gasp_fast.files import write_atomically
from gasp_fast.run_folder import checkpoint_folders

from .distributed import Processes

ABOUT = "about.json"


@contextmanager
def complete_or_absent(folder: Path, processes: Processes) -> Iterator[Path]:
    """Yield a temporary folder for all processes to write into; it is renamed to `folder` when all are done."""
    partial = folder.with_name(f".{folder.name}.partial")
    if processes.first:
        sweep(folder.parent)
        partial.mkdir(parents=True)
    processes.barrier()
    yield partial
    processes.barrier()
    if processes.first:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def to_resume(out: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` names; None: start from the beginning."""
    if resume == "never":
        if checkpoint_folders(out):
            raise ValueError(f"run.out = {str(out)!r} holds checkpoints and run.resume = never; give another run.out")
        return None
    if resume == "auto":
        return next(reversed(checkpoint_folders(out)), None)
    folder = Path(resume)
    if not folder.is_dir():
        raise OSError(f"run.resume = {resume!r}: no such folder; give a checkpoint-N folder, auto or never")
    read_about(folder)
    return folder


def write_about(folder: Path, **facts: Any) -> None:
    write_atomically(folder / ABOUT, (json.dumps(facts, indent=1) + "\n").encode())


def read_about(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    except OSError:
        raise OSError(f"run.resume = {str(folder)!r} is no checkpoint of a training run ({ABOUT} is missing)") from None
    return facts


# ---- rotation -------------------------------------------------------------------------------------------------------


def rotate(out: Path, keep: int, keep_best: bool) -> None:
    """Remove all but the newest `keep` checkpoints and the best one. Each is renamed before it is deleted."""
    folders = checkpoint_folders(out)
    best = best_of(folders) if keep_best else None
    for folder in folders[:-keep]:
        if folder != best:
            removed = folder.with_name(f".{folder.name}.removed")
            folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def best_of(folders: list[Path]) -> Path | None:
    """The checkpoint with the highest score, the oldest if several share it; None if none has a score."""
    scores = {folder: read_about(folder)["score"] for folder in folders if (folder / ABOUT).is_file()}
    scored = [folder for folder in scores if scores[folder] is not None]
    return max(scored, key=lambda folder: scores[folder], default=None)


def sweep(out: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for leftover in (*out.glob(".checkpoint-*.partial"), *out.glob(".checkpoint-*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)


# ---- random number generators ---------------------------------------------------------------------------------------


def write_random_state(folder: Path, processes: Processes) -> None:
    """Python's, NumPy's and torch's generators of this process."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if processes.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(processes.device)
    torch.save(state, _random_state(folder, processes))


def read_random_state(folder: Path, processes: Processes) -> None:
    """Restore the generators of this process. They stay as they are if the checkpoint has none for this rank."""
    path = _random_state(folder, processes)
    if not path.is_file():
        return
    state = load(path)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if processes.device.type == "cuda":
        cuda = state["cuda"]  # in older checkpoints a list, one for each GPU
        torch.cuda.set_rng_state(cuda[processes.device.index] if isinstance(cuda, list) else cuda, processes.device)


def _random_state(folder: Path, processes: Processes) -> Path:
    return folder / ("rng_state.pth" if processes.world_size == 1 else f"rng_state_{processes.rank}.pth")
