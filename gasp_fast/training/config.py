"""`TrainConfig`: everything that a training run can be told. Knows no code that it configures, except by name.

The defaults are the paper's recipe for a 7B Qwen2.5-VL. Every field can be set in a YAML file or overridden on the
command line by its path (`train.learning_rate=2e-4`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gasp_fast.collator import CollatorConfig
from gasp_fast.data.tracks.sequences import SequenceConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision-language model that is trained."""

    source: str  # folder of a saved model, or hub name
    dtype: Literal["bf16", "fp32"] = "bf16"  # of its computation; what is trained is always stored in fp32
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"] = "auto"  # auto: best present
    frame_pixels: int | None = None  # most pixels of a frame after resizing, for models that keep the aspect ratio
    liger: bool = False  # Liger's fused layers for the base model

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("model.source is empty; name the folder of a saved model, or a hub name")


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


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters on q, k, v and o of the language model. Used where `train.mode` is lora."""

    rank: int = 128  # 512 for LLaVA-NeXT-Video
    alpha: int | None = None  # None: twice the rank
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank = {self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout} must lie in 0 <= dropout < 1")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Correspondence heads, one on each supervised decoder layer."""

    layers: str = "all"  # or 18-25, 7, 1-4,25-28: counted from 1, both ends included
    init: Literal["svd", "random"] = "svd"  # svd: from the layer's own query projection
    mid_size: int | None = None  # None: half of the hidden size
    out_size: int | None = None  # None: the hidden size (svd: the outputs of the query projection)
    compute: Literal["fp32", "tf32", "bf16"] = "tf32"  # of the products; weights are fp32


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`lm_weight * lm + corr_weight * corr + depth_weight * depth`. Without the last two there are no heads."""

    lm_weight: float = 1.0
    corr_weight: float = 0.3
    depth_weight: float = 1.0
    temperature: float = 0.07
    learnable_temperature: bool = False
    negatives: Literal["sequence", "frame"] = "sequence"
    backend: Literal["auto", "triton", "cpp", "torch"] = "auto"

    def __post_init__(self) -> None:
        for name in ("lm_weight", "corr_weight", "depth_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} = {getattr(self, name)} must be 0 or more")
        if not self.temperature > 0:
            raise ValueError(f"loss.temperature = {self.temperature} must be above 0")

    @property
    def geometric(self) -> bool:
        return self.corr_weight > 0 or self.depth_weight > 0


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Sequences of posed frames with depth, which give tracks."""

    root: str = ""  # folder of scenes; empty: none
    weight: float = 1.0  # relative to the other sources
    annotations: tuple[
        str, ...
    ] = ()  # folders made by `gasp-fast tracks`, of the same sequences; empty: track on the fly
    grids: tuple[int, ...] = (8, 24)  # query points along a side, coarse and fine; for tracking on the fly
    keep: float = 0.5  # share of the tracks that is kept; for tracking on the fly
    held_out: float = 0.0  # share of the scenes that is never trained on
    sequences: SequenceConfig = field(default_factory=SequenceConfig)  # for tracking on the fly


@dataclass(frozen=True, kw_only=True)
class QAConfig:
    """Questions and answers about videos, in LLaVA-Video's schema."""

    root: str = ""  # folder of JSON lists; empty: none
    weight: float = 1.0
    configs: tuple[str, ...] = ()  # its sub-folders to read; empty: all
    frames: int = 16  # of a video
    longest_side: int | None = None  # shrink frames to this while decoding
    timeout: float = 30.0  # seconds, for a video that does not decode


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on: one stream that interleaves the sources by weight."""

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    qa: QAConfig = field(default_factory=QAConfig)
    vqa: QAConfig = field(
        default_factory=QAConfig
    )  # a second source of questions: the baseline of tracks told in words
    collator: CollatorConfig = field(default_factory=CollatorConfig)
    workers: int = 4  # loader processes of each training process; 0: load in the training process
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        if not (self.scenes.root or self.qa.root or self.vqa.root):
            raise ValueError("data names no source; give data.scenes.root, data.qa.root or data.vqa.root")
        if self.workers < 0:
            raise ValueError(f"data.workers = {self.workers} must be 0 or more")


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
    lora: LoraSettings = field(default_factory=LoraSettings)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig
    run: RunConfig
    deepspeed: str | None = None  # a DeepSpeed file: configs/deepspeed/zero2.json; None: none, or DDP under torchrun
