"""`LossConfig`: the settings of the loss, in a recipe and in `gasp_loss`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-18, 1e18  # beyond, similarities or gradients overflow in float32


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The arguments of `gasp_loss` that stay the same from call to call."""

    corr_weight: float = 0.3  # of the correspondence loss
    depth_weight: float = 1.0  # of the depth loss
    temperature: float = 0.07  # divides the cosines
    negatives: Literal["sequence", "frame"] = "sequence"  # tokens of the whole sequence, or of the target's frame
    other_targets: Literal["negatives", "ignored"] = "negatives"  # an anchor's further targets, in its sum of negatives
    eps: float = 1e-6  # keeps the relative depth error finite
    backend: Literal["auto", "triton", "cpp", "torch"] = "auto"  # auto: triton on a GPU, cpp on a CPU
    workspace: int | None = None  # MiB of scratch memory; null: 256 on GPUs of 40 GB and more, 128 below, 24 on a CPU

    def __post_init__(self) -> None:
        for name in ("corr_weight", "depth_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} = {getattr(self, name)} must be finite and 0 or more")
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise ValueError(
                f"loss.temperature = {self.temperature} must be from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
            )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"loss.eps = {self.eps} must be finite and above 0")
        if self.workspace is not None and self.workspace < 1:
            raise ValueError(f"loss.workspace = {self.workspace} must be at least 1 (MiB)")

    @property
    def geometric(self) -> bool:
        """Whether any term has a weight, so that layers are supervised."""
        return self.corr_weight > 0 or self.depth_weight > 0
