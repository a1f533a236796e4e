"""`ObjectiveConfig`: the loss that training minimises."""

from __future__ import annotations

from dataclasses import dataclass

from gasp_fast.loss.config import LossConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(LossConfig):
    """`lm_weight * lm + corr_weight * corr + depth_weight * depth`. Without the last two weights there are no heads."""

    lm_weight: float = 1.0
    learnable_temperature: bool = False  # train the temperature, beginning at `temperature`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lm_weight >= 0:
            raise ValueError(f"loss.lm_weight = {self.lm_weight} must be 0 or more")
