"""The optimiser: AdamW over groups of parameters that learn at their own rates.

Knows parameters and rates. The schedule (linear warm-up, then a cosine to zero) is transformers' own, and multiplies
the rate of every group alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .config import OptimisationConfig
from .model import Group


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
