"""The optimiser: AdamW over groups of parameters that learn at their own rates.

Knows parameters and rates. The schedule (linear warm-up, then a cosine to zero) is transformers' own, and multiplies
the rate of every group alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from .model import Group


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """How it is trained."""

    mode: Literal["lora", "full"] = "lora"
    epochs: float = 3.0  # walks through the scenes (through the questions, where there are no scenes)
    steps: int | None = None  # optimiser steps, instead of epochs
    batch_size: int = 32  # sequences of an optimiser step, over all processes
    micro_batch_size: int = 1  # sequences that a process takes at once; the rest is accumulated
    learning_rate: float = 1e-4  # at its peak
    head_lr_scale: float = 4.0
    warmup: float = 0.1  # share of all steps, before the cosine
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    checkpointing: Literal["off", "non_reentrant", "reentrant"] = "non_reentrant"  # of activations
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"train.epochs = {self.epochs} must be above 0, or train.steps given")
        for name in ("steps", "batch_size", "micro_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "head_lr_scale", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} = {getattr(self, name)} must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train.warmup = {self.warmup} is a share of all steps; give 0 <= warmup < 1")


def make_optimizer(groups: Iterable[Group], config: OptimisationConfig) -> torch.optim.Optimizer:
    """Heads learn `head_lr_scale` times as fast as the rest; vectors and scalars are never decayed."""
    settings: list[dict[str, Any]] = []
    for group in groups:
        scale = config.head_lr_scale if group.name == "heads" else 1.0
        # ZeRO-3 has flattened the parameters by the time it asks; it keeps their shapes aside.
        decayed = [p for _, p in group.parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
        plain = [p for _, p in group.parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                settings.append({"params": parameters, "lr": scale * config.learning_rate, "weight_decay": decay})
    return torch.optim.AdamW(settings, lr=config.learning_rate, fused=True)
