"""`TrainConfig`: a training run, as a recipe describes it. Each part stands beside the code that it configures.

The defaults are the paper's recipe for a 7B Qwen2.5-VL. Every field can be set in a YAML file or overridden on the
command line by its path (`train.learning_rate=2e-4`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gasp_fast.backbones.adapters import AdapterConfig
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.supervision.heads import HeadsConfig

from .objective import ObjectiveConfig
from .optim import OptimisationConfig
from .stream import DataConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it leaves behind."""

    out: str  # folder of the run: config.yaml, log.jsonl, training.png, checkpoint-N/
    resume: str = "auto"  # auto: go on from the last checkpoint in `out`, if any; never; or a checkpoint folder
    log_every: int = 1  # steps; the last step is always logged
    save_every: int = 500  # steps; the last step is always saved
    keep: int = 3  # newest checkpoints to keep
    keep_best: bool = True  # and the one with the best PCK (the least loss, without geometry) since the one before
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, trackio
    bad_steps: int = 3  # steps whose gradient is not finite that may be skipped before the run stops
    min_free_gb: float = 5.0  # on the disk of `out`, to begin and to go on
    progress: bool = True  # a bar on the terminal (lines, where there is none), and a table at the end

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("run.out is empty; name a folder for the run")
        for name in ("log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} = {getattr(self, name)} must be at least 1")


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
    deepspeed: str | None = None  # a DeepSpeed file: configs/deepspeed/zero2.json; None: none, or DDP under torchrun
