"""`TrainConfig`: the configuration of a training run. Each part is defined beside the code that it configures.

The defaults are the paper's recipe for a 7B Qwen2.5-VL. Every field can be set in a YAML file or overridden on the
command line by its path (`train.learning_rate=2e-4`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gasp_fast.backbones.adapters import AdapterConfig
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.loss.config import LossConfig
from gasp_fast.supervision.heads import HeadsConfig

from .optim import OptimisationConfig
from .stream import DataConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(LossConfig):
    """`lm_weight * lm + corr_weight * corr + depth_weight * depth`. Without the last two weights there are no heads."""

    lm_weight: float = 1.0
    learnable_temperature: bool = False  # train the temperature, beginning at `temperature`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lm_weight < math.inf:
            raise ValueError(f"loss.lm_weight = {self.lm_weight} must be finite and 0 or more")
        if not self.lm_weight and not self.geometric:
            raise ValueError(
                "loss.lm_weight, loss.corr_weight and loss.depth_weight are all 0, so nothing is trained; "
                "give one of them a weight"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run writes, how often, and when it stops early."""

    out: str  # folder of the run: config.yaml, log.jsonl, training.png, checkpoint-N/
    resume: str = "auto"  # auto: from the last checkpoint in `out`, if there is one; never; or a checkpoint folder
    log_every: int = 1  # steps; the last step is always logged
    save_every: int = 500  # steps; the last step is always saved
    keep: int = 3  # newest checkpoints to keep
    keep_best: bool = True  # also keep the best one: PCK (without heads: LM loss) since the previous checkpoint
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, trackio
    bad_steps: int = 3  # how many steps with a gradient that is not finite are skipped before the run stops
    min_free_gb: float = 5.0  # the run stops if the disk of `out` has less free space
    timeout: float = 600.0  # seconds that a process waits for the others, as for a checkpoint, before the run ends
    progress: bool = True  # a progress bar (lines, where the output is no terminal), and a table at the end

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("run.out is empty; name a folder for the run")
        for name in ("log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} = {getattr(self, name)} must be at least 1")
        for name in ("bad_steps", "min_free_gb"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"run.{name} = {getattr(self, name)} must be 0 or more")
        if not 1 <= self.timeout < math.inf:
            raise ValueError(f"run.timeout = {self.timeout} must be 1 second or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig
    train: OptimisationConfig = field(default_factory=OptimisationConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig
    run: RunConfig
    deepspeed: str | None = None  # a DeepSpeed file such as configs/deepspeed/zero2.json; None: plain PyTorch or DDP
