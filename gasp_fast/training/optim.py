"""The optimiser: AdamW over groups of parameters, each with its learning rate.

A schedule multiplies the rates of all groups alike: a linear warm-up, then a cosine down to zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gasp_fast.config.limits import LARGEST_SEED, MOST, check_whole

LARGEST_BATCH = 65_536  # sequences: a step deals them out one by one
MOST_STEPS = 1_000_000_000  # and most tokens of a forward pass


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """How the model is trained."""

    # What learns besides the heads: adapters, all weights, or nothing (heads), which shows what heads alone can learn.
    mode: Literal["lora", "full", "heads"] = "lora"
    epochs: float = 3.0  # passes through the scenes; without scenes, through the questions
    steps: int | None = None  # optimiser steps, instead of epochs
    batch_size: int = 32  # sequences of an optimiser step, over all processes
    # Of a forward pass on each process; the others of a step are accumulated. Either the number of sequences (null: 1),
    # or the most tokens, padding included. Both decide speed and memory, not what is optimised.
    micro_batch_size: int | None = None
    tokens_at_once: int | None = None
    packing: bool = False  # the sequences of a forward pass lie one after another in one row; none is padded
    learning_rate: float = 1e-4  # peak, after the warmup
    head_lr_scale: float = 4.0  # learning rate of the heads, relative to learning_rate
    warmup: float = 0.1  # share of all steps; then the cosine begins
    weight_decay: float = 0.0  # of AdamW, on matrices
    clip: float = 1.0  # maximum norm of the gradient
    # Decoder layers that recompute their activations in backward: auto (as few as the GPU's memory demands), off
    # (none), full (all; also named non_reentrant), reentrant (all, in torch's older way), every:N (each Nth).
    checkpointing: str = "auto"
    seed: int = 0  # of the weights of new adapters and heads, and of dropout

    def __post_init__(self) -> None:
        if not 0 < self.epochs <= MOST:
            raise ValueError(f"train.epochs = {self.epochs} must be finite and above 0, at most {MOST:,}")
        check_whole(self, ("steps", "tokens_at_once"), "train.", most=MOST_STEPS)
        check_whole(self, ("batch_size", "micro_batch_size"), "train.", most=LARGEST_BATCH)
        check_whole(self, ("seed",), "train.", least=0, most=LARGEST_SEED)
        if self.tokens_at_once is not None and self.micro_batch_size is not None:
            raise ValueError(
                f"train.tokens_at_once = {self.tokens_at_once} and train.micro_batch_size = {self.micro_batch_size} "
                "both say how much is computed at once; set one of them to null"
            )
        if self.packing and self.tokens_at_once is None and self.micro_batch_size in (None, 1):
            raise ValueError(
                "train.packing = true packs nothing with train.micro_batch_size = 1; use a larger one, or "
                "train.tokens_at_once"
            )
        if not re.fullmatch(r"auto|off|full|non_reentrant|reentrant|every:[1-9]\d{0,5}", self.checkpointing):
            raise ValueError(
                f"train.checkpointing = {self.checkpointing!r} must be auto, off, full, reentrant, or every:N such as "
                "every:2"
            )
        for name in ("learning_rate", "head_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} = {getattr(self, name)} must be finite and above 0")
        if not self.clip > 0:
            raise ValueError(f"train.clip = {self.clip} must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"train.weight_decay = {self.weight_decay} must be finite and 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train.warmup = {self.warmup} is a share of all steps; give 0 <= warmup < 1")

    def kept_layers(self, layers: int, fitting: int = 0) -> list[int]:
        """The decoder layers, of so many, that keep their activations until backward. auto keeps the last `fitting`.

        Backward frees the last ones first, before it needs memory to recompute the others.
        """
        if self.checkpointing == "off":
            return list(range(layers))
        if self.checkpointing.startswith("every:"):
            every = int(self.checkpointing.removeprefix("every:"))
            return [layer for layer in range(layers) if (layers - layer) % every]
        return list(range(layers - fitting, layers)) if self.checkpointing == "auto" else []

    def steps_of(self, epoch: int) -> int:
        """Optimiser steps of the run, where a pass through the first source takes `epoch` samples of all sources."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * epoch) // self.batch_size)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike."""

    name: str  # "adapters" | "model" | "heads"
    parameters: list[nn.Parameter]

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


def trained_groups(model: nn.Module) -> Iterator[Group]:
    """The trained parameters of a `SupervisedModel` that is not sharded yet; empty groups are left out."""
    groups: dict[str, list[nn.Parameter]] = {"adapters": [], "model": [], "heads": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "heads" if name.startswith("supervision.") else "adapters" if "lora_" in name else "model"
            groups[kind].append(parameter)
    return (Group(name, parameters) for name, parameters in groups.items() if parameters)


def make_optimizer(groups: Iterable[Group], config: OptimisationConfig) -> torch.optim.Optimizer:
    """AdamW. Heads learn `head_lr_scale` times as fast as the rest; vectors and scalars are not decayed."""
    settings: list[dict[str, Any]] = []
    for group in groups:
        scale = config.head_lr_scale if group.name == "heads" else 1.0
        decayed = [parameter for parameter in group.parameters if parameter.dim() > 1]
        plain = [parameter for parameter in group.parameters if parameter.dim() <= 1]
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                settings.append({"params": parameters, "lr": scale * config.learning_rate, "weight_decay": decay})
    return torch.optim.AdamW(settings, lr=config.learning_rate, fused=True)


@dataclass(frozen=True)
class Schedule:
    """The learning rate in each step as a share of its peak, for `LambdaLR`."""

    steps: int  # of the run; after them the rate is `lowest`
    warmup: int  # steps
    cosine_begins: int  # after so many steps: those of the warm-up, or more if the run was made longer later
    cosine_share: float = 1.0  # with which it begins
    lowest: float = 0.0  # with which it ends

    @classmethod
    def of(cls, warmup: float, steps: int, lowest: float = 0.0) -> Schedule:
        begins = math.ceil(warmup * steps)
        return cls(steps, begins, begins, lowest=lowest)

    def __call__(self, done: int) -> float:
        if done < self.warmup:
            return done / self.warmup
        progress = (done - self.cosine_begins) / max(1, self.steps - self.cosine_begins)
        falling = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lowest + (self.cosine_share - self.lowest) * falling

    def longer(self, done: int, steps: int) -> Schedule:
        """Of a run that is made longer after so many steps: the rest of the warm-up, then a new cosine.

        It begins with the rate that the old one has reached, so that the rate does not jump.
        """
        begins = max(done, self.warmup)
        return Schedule(steps, self.warmup, begins, self(begins), self.lowest)


def rate_change(schedule: LambdaLR, stopped: float) -> str | None:
    """One line if a schedule that resumes goes on at another learning rate than `stopped`."""
    goes_on, peak = schedule.get_last_lr()[0], schedule.base_lrs[0]
    if math.isclose(stopped, goes_on, rel_tol=1e-6, abs_tol=1e-12 * peak):
        return None
    return f"step {schedule.last_epoch:,}: the learning rate goes from {stopped:.3g} to {goes_on:.3g}"
