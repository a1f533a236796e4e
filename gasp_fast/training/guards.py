"""Checks that refuse to waste a night on a cluster. Each failure is one line that names the cause and the cure.

Before the first step: everything the run needs is there, and its folder is no other run's; adapters sit where they
should and only there; the model will place the tokens of the very first batch correctly. After a few steps: what should
learn has moved. At every step: a gradient that is not finite is named and its step skipped, a few times; then the run
stops and leaves the batch.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gasp_fast.backbones import unwrap

from .checkpoints import whole
from .config import RunConfig, TrainConfig
from .model import SupervisedModel

LEARNING_STEPS = 5  # after these, with warm-up and all, every head and adapter must have moved


class GuardError(ValueError):
    """A run that must not begin, or not go on."""


def check_disk(config: RunConfig) -> None:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free / 1e9
    if free < config.min_free_gb:
        raise GuardError(
            f"run.out = {config.out!r} has {free:.1f} GB left, run.min_free_gb = {config.min_free_gb:g} are wanted; "
            "make room or write elsewhere"
        )


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """While this lasts no other run writes into `out`. The lock goes with the process, however that ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GuardError(
                f"run.out = {str(out)!r} is where another run is writing; wait for it, stop it, or name another folder"
            ) from None
        except OSError:  # some file systems of clusters know no locks
            pass
        yield
    finally:
        os.close(folder)


def check_adapters(model: SupervisedModel) -> int:
    """q, k, v and o of every decoder layer carry an adapter, nothing else does. Returns how many that is."""
    backbone, inner = model.backbone, unwrap(model.model)
    adapted = {name.split(".lora_A")[0] for name, _ in inner.named_parameters() if ".lora_A" in name}
    wrong = sorted(name for name in adapted if not re.fullmatch(backbone.lora_targets, name))
    wanted = 4 * backbone.layer_count
    if wrong or len(adapted) != wanted:
        also = f", among them {wrong[0]}" if wrong else ""
        raise GuardError(
            f"adapters sit on {len(adapted)} modules{also}; {wanted} are expected (q, k, v, o of "
            f"{backbone.layer_count} decoder layers): lora_targets of {type(backbone).__name__} does not fit this model"
        )
    return len(adapted)


def check_positions(model: SupervisedModel, batch: dict[str, Any]) -> None:
    """The backbone's own guard (Qwen: three-dimensional positions) on the first batch."""
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model.backbone.check_inputs(model.model, inputs)


class LearningGuard:
    """What must move has moved: every adapter's B (which starts at zero), every head.

    Compares sums of weights before the first step with those a few steps later; a gradient that is zero, or never
    arrives, leaves them as they were. All processes take part: weights may have to be gathered.
    """

    def __init__(self, model: SupervisedModel) -> None:
        self.watched = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ("lora_B" in name or (name.startswith("supervision.") and "weight" in name))
        }
        self.highest = -1 if model.supervision is None else max(model.supervision.layers)
        self.before = self._sums()

    def _sums(self) -> dict[str, float]:
        return {
            name: float(whole(parameter).double().abs().sum() + whole(parameter).double().square().sum())
            for name, parameter in self.watched.items()
        }

    def check(self, steps: int, saw_matches: bool, saw_answers: bool) -> None:
        now = self._sums()
        reached = [name for name in now if self._is_reached(name, saw_matches, saw_answers)]
        still = [name for name in reached if now[name] == self.before[name]]
        if still:
            raise GuardError(
                f"{len(still)} of {len(reached)} watched weights have not moved after {steps} steps, the first is "
                f"{still[0]}: no gradient reaches them. Look at train.checkpointing, heads.layers and the loss weights"
            )

    def _is_reached(self, name: str, saw_matches: bool, saw_answers: bool) -> bool:
        """Whether a loss of the steps so far depends on it: heads on matches, adapters on what is above them."""
        if name.startswith("supervision."):
            return saw_matches
        layer = re.search(r"layers\.(\d+)\.", name)
        return saw_answers or (saw_matches and layer is not None and int(layer[1]) <= self.highest)


class BadSteps:
    """Counts steps whose gradient is not finite, and stops the run when there were too many."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.allowed, self.out, self.rank, self.seen = config.bad_steps, Path(config.out), rank, 0

    def skip(self, step: int, batches: Sequence[dict[str, Any]], sources: Sequence[str]) -> str:
        """Say which step was skipped; beyond the allowed number, save this process's batches and stop."""
        self.seen += 1
        named = f"step {step}: the gradient is not finite ({', '.join(sources)} on process {self.rank})"
        if self.seen <= self.allowed:
            return f"{named}; skipped, {self.allowed - self.seen} more may be"
        path = self.out / f"bad-step-{step}-process-{self.rank}.pt"
        torch.save(list(batches), path)
        raise GuardError(
            f"{named}; {self.seen} such steps, run.bad_steps = {self.allowed} may be skipped. The batch is in {path}"
        )


def check_resume(config: TrainConfig, ranks: int, stage: int, about: dict[str, Any], folder: Path) -> None:
    """An exact resume needs the processes and the ZeRO stage of the checkpoint: its optimiser is split among them."""
    now = {"ranks": ranks, "zero_stage": stage, "mode": config.train.mode, "batch_size": config.train.batch_size}
    for name, value in now.items():
        # Without ZeRO nothing is split, and any number of processes may go on.
        if about[name] != value and not (name == "ranks" and stage == about["zero_stage"] == 0):
            raise GuardError(
                f"{folder} was written with {name} = {about[name]}, this run has {value}; use the same to go on from "
                "it, or another run.out to begin anew"
            )
