"""`TrainConfig`: the configuration of a training run. Each part is defined beside the code that it configures.

The defaults are the paper's recipe for a 7B Qwen2.5-VL. Every field can be set in a YAML file or overridden on the
command line by its path (`train.learning_rate=2e-4`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gasp_fast.backbones.adapters import AdapterConfig
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.config.limits import MOST, check_whole
from gasp_fast.config.loader import keys_of
from gasp_fast.data.tracks.build import LARGEST_GRID
from gasp_fast.loss.config import LossConfig
from gasp_fast.supervision.geometric import LayerReduction
from gasp_fast.supervision.heads import HeadsConfig

from .averages import Average
from .optim import MOST_STEPS, OptimisationConfig
from .stream import DataConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(LossConfig):
    """`lm_weight * lm + corr_weight * corr + depth_weight * depth`. Without the last two weights there are no heads.

    Each term is a mean over the whole optimiser step, over all processes (`averages.py`).
    """

    lm_weight: float = 1.0  # of the language loss
    average: Average = "sequence"  # what counts once in corr and depth: sequence, anchor, track or match
    layer_reduction: LayerReduction = "mean"  # of the losses of the supervised layers: mean or sum
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

    out: str  # folder of the run: config.yaml, run.json, log.jsonl, training.png, checkpoint-N/
    resume: str = "auto"  # auto: from the last checkpoint in `out`, if there is one; never; or a checkpoint folder
    allow_changes: tuple[str, ...] = ()  # keys, or groups of keys, that may differ from the checkpoint's when resuming
    log_every: int = 1  # steps; the last step is always logged
    save_every: int = 500  # steps; the last step is always saved
    save_async: bool = False  # write checkpoints while training goes on; needs host memory for one of them
    keep: int = 3  # newest checkpoints to keep
    keep_best: bool = True  # also keep the best one, which the link `best` names: by evaluate.best; without
    # evaluation by the PCK of training batches (without heads: LM loss) since the previous checkpoint
    report_to: tuple[str, ...] = ()  # trackers: tensorboard, wandb, trackio; they get all settings and every log line
    project: str = "gasp_fast"  # in the trackers
    name: str | None = None  # of the run in the trackers; null: `out`
    bad_steps: int = 3  # how many steps with a gradient that is not finite are skipped before the run stops
    max_skipped: float = 0.1  # share of the samples that may be skipped because they cannot be used; more end the run
    min_free_gb: float = 5.0  # the run stops if the disk of `out` has less free space
    timeout: float = 600.0  # seconds that a process waits for the others, as for a checkpoint, before the run ends;
    # for a batch that is read from files it waits half of them
    progress: bool = True  # a progress bar (lines, where the output is no terminal), and a table at the end

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("run.out is empty; name a folder for the run")
        for key in ("project", "name"):
            if (value := getattr(self, key)) is not None and not value.strip():
                raise ValueError(f"run.{key} is empty; name it, or leave it out")
        check_whole(self, ("log_every", "save_every", "keep"), "run.", most=MOST_STEPS)
        check_whole(self, ("bad_steps",), "run.", least=0, most=MOST_STEPS)
        if not self.min_free_gb >= 0:
            raise ValueError(f"run.min_free_gb = {self.min_free_gb} must be 0 or more")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"run.max_skipped = {self.max_skipped} is a share of the samples; give 0 to 1")
        if not 1 <= self.timeout <= MOST:
            raise ValueError(f"run.timeout = {self.timeout} must be 1 second or more, and at most {MOST:,}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation on held-out scenes while training, and what it decides: `held_out.py`. Without scenes there is none.

    The sequences, predictions and metrics are those of `gasp-fast evaluate`.
    """

    scenes: tuple[str, ...] = ()  # scenes or folders of scenes; of data.scenes.root, those that held_out leaves out
    every: int = 500  # steps; the last step is always evaluated
    sequences: int = 16  # in all; the processes share them and keep their frames in memory
    frames: int = 8  # of a sequence
    grid: int = 8  # query points along each axis of the first frame
    max_gap: int = 24  # largest number of frames between the first and a later frame of a sequence
    features: Literal["auto", "head", "qk", "hidden"] = (
        "auto"  # auto: head; without correspondence heads qk; without geometry hidden
    )
    best: Literal["pck", "peak", "moved", "rho"] = "pck"  # pck: mean of all layers; the others: of the best layer
    patience: int | None = None  # evaluations without a better one after which the run ends; null: it does not

    def __post_init__(self) -> None:
        check_whole(self, ("every", "patience"), "evaluate.", most=MOST_STEPS)
        check_whole(self, ("sequences", "frames", "max_gap"), "evaluate.")
        check_whole(self, ("grid",), "evaluate.", most=LARGEST_GRID)
        if self.patience is not None and not self.scenes:
            raise ValueError(f"evaluate.patience = {self.patience} needs evaluate.scenes to evaluate on; name some")
        if self.frames < 2:
            raise ValueError(f"evaluate.frames = {self.frames} must be at least 2: a match needs two frames")
        if self.max_gap < self.frames - 1:
            raise ValueError(
                f"evaluate.max_gap = {self.max_gap} is too small for {self.frames} frames; raise it to "
                f"{self.frames - 1}, or lower evaluate.frames"
            )


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
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    deepspeed: str | None = None  # zero1, zero2, zero3, or a DeepSpeed file; null: plain PyTorch or DDP

    def __post_init__(self) -> None:
        if self.evaluate.scenes and self.model.frames_as == "video_pairs":
            raise ValueError(
                "evaluate.scenes scores points frame by frame, but model.frames_as = 'video_pairs' merges frames into "
                "one grid of tokens; evaluate the finished run with gasp-fast evaluate --frames-as video_doubled"
            )
        if self.train.mode == "heads" and not self.loss.geometric:
            raise ValueError(
                "train.mode = 'heads' trains the correspondence heads only, and without a geometric loss there are "
                "none; set loss.corr_weight or loss.depth_weight above 0"
            )
        if self.train.mode == "heads" and self.heads.live:
            raise ValueError(
                f"train.mode = 'heads' leaves the model as it is, but heads.kind = {self.heads.kind} trains its own "
                "projections; set heads.kind=correspondence"
            )
        for name in self.run.allow_changes:
            if name not in (keys := keys_of(TrainConfig)):
                raise ValueError(
                    f"run.allow_changes names {name!r}, which is no key; keys are {', '.join(keys[:3])}, …"
                )
        if self.loss.learnable_temperature and not self.heads.own:
            raise ValueError(
                "loss.learnable_temperature is saved with correspondence heads, but there are none with heads.kind = "
                f"{self.heads.kind}; set loss.learnable_temperature=false"
            )
