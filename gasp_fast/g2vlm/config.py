"""`G2TrainConfig`: a training run of G²VLM. A recipe of it says `objective: g2vlm`.

Keys that GASP's recipes have too mean the same. The stages of the paper differ in what `train.mode` trains and which
losses have weights:

    pretraining, 1a and 1b       geometric    geometry
    joint, G²VLM                 semantic     text
    joint, SR                    both         text
    joint, the best one          both         geometry and text
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gasp_fast.config.limits import LARGEST_SEED, check_whole
from gasp_fast.config.loader import keys_of
from gasp_fast.training.config import RunConfig
from gasp_fast.training.optim import LARGEST_BATCH, MOST_STEPS

from .data_config import MOST_FRAMES, G2DataConfig
from .experts import ExpertsConfig
from .heads import HeadsConfig
from .supervision import G2GaspConfig

Mode = Literal["geometric", "semantic", "both"]
FROZEN = {"geometric": "semantic", "semantic": "geometric", "both": "none"}  # by what is trained


@dataclass(frozen=True, kw_only=True)
class G2ModelConfig:
    """The two models that G²VLM is made from, or a trained one to continue from."""

    source: str  # of the semantic expert and its vision tower: Qwen2-VL, a folder of a saved model or a hub name
    encoder: str = "facebook/dinov2-with-registers-large"  # of frames; stays frozen
    start: str | None = None  # checkpoint of an earlier stage, or folder of a saved G²VLM model, to begin from

    def __post_init__(self) -> None:
        for key in ("source", "encoder"):
            if not getattr(self, key):
                raise ValueError(f"model.{key} is empty; name the folder of a saved model, or a hub name")


@dataclass(frozen=True, kw_only=True)
class G2LossConfig:
    """`text_weight * lm + geometry_weight * (local + world + normal + 0.2 * camera)`.

    `camera` is `translation_weight * translation + rotation`.

    Each is a mean over the optimiser step: of labelled tokens, or of sequences.
    """

    geometry_weight: float = 1.0
    text_weight: float = 0.0
    translation_weight: float = 200.0  # 200 in the paper, 100 in its code
    zero_above: float | None = None  # sequences with a larger loss of geometry count nothing; 10 in pretraining
    backend: Literal["auto", "fused", "torch"] = "auto"  # of the loss of points: kernels where there are some, or plain

    def __post_init__(self) -> None:
        for key in ("geometry_weight", "text_weight", "translation_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"loss.{key} = {getattr(self, key)} must be finite and 0 or more")
        if not self.geometry_weight and not self.text_weight:
            raise ValueError("loss.geometry_weight and loss.text_weight are both 0; give one of them a weight")
        if self.zero_above is not None and not self.zero_above > 0:
            raise ValueError(f"loss.zero_above = {self.zero_above} must be above 0, or null for no limit")


@dataclass(frozen=True, kw_only=True)
class G2OptimisationConfig:
    """How the model is trained: AdamW, a linear warm-up, then a cosine down to `last_learning_rate`."""

    mode: Mode = "geometric"  # which expert learns; the vision encoders never do
    steps: int = 100_000
    batch_size: int = 32  # sequences of an optimiser step, over all processes
    tokens_at_once: int = 12_288  # most patches of a forward pass on each process; one sequence is always taken
    learning_rate: float = 2e-4  # peak, after the warmup
    last_learning_rate: float = 1e-7
    warmup: float = 0.01  # share of all steps
    beta1: float = 0.9  # of AdamW, as are the next two
    beta2: float = 0.95
    epsilon: float = 1e-15
    clip: float = 1.0  # maximum norm of the gradient
    seed: int = 0  # of new weights

    def __post_init__(self) -> None:
        check_whole(self, ("steps", "tokens_at_once"), "train.", most=MOST_STEPS)
        check_whole(self, ("batch_size",), "train.", most=LARGEST_BATCH)
        check_whole(self, ("seed",), "train.", least=0, most=LARGEST_SEED)
        for key in ("learning_rate", "epsilon", "clip"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"train.{key} = {getattr(self, key)} must be finite and above 0")
        if not 0 <= self.last_learning_rate <= self.learning_rate:
            raise ValueError(
                f"train.last_learning_rate = {self.last_learning_rate} must be 0 or more, and no more than "
                f"train.learning_rate = {self.learning_rate}"
            )
        for key in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"train.{key} = {getattr(self, key)} must be 0 or more, and below 1")


@dataclass(frozen=True, kw_only=True)
class G2EvaluateConfig:
    """Evaluation on scenes that are not trained on, while training. Without scenes there is none."""

    scenes: tuple[str, ...] = ()  # folders of scenes; of data.roots, those that data.held_out leaves out
    every: int = 1000  # steps; the last step is always evaluated
    sequences: int = 16  # in all
    frames: int = 4  # of a sequence
    stride: int = 4  # frames of the scene from one to the next
    best: Literal["delta", "auc"] = "delta"  # decides about the best checkpoint; larger is better
    patience: int | None = None  # evaluations without a better one after which the run ends; null: it does not

    def __post_init__(self) -> None:
        check_whole(self, ("every", "patience"), "evaluate.", most=MOST_STEPS)
        check_whole(self, ("sequences", "stride"), "evaluate.")
        check_whole(self, ("frames",), "evaluate.", least=2, most=MOST_FRAMES)
        if self.patience is not None and not self.scenes:
            raise ValueError(f"evaluate.patience = {self.patience} needs evaluate.scenes to evaluate on; name some")


@dataclass(frozen=True, kw_only=True)
class G2TrainConfig:
    """A training run of G²VLM."""

    objective: Literal["g2vlm"] = "g2vlm"  # tells these recipes from those of GASP
    model: G2ModelConfig
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: G2LossConfig = field(default_factory=G2LossConfig)
    gasp: G2GaspConfig = field(default_factory=G2GaspConfig)
    train: G2OptimisationConfig = field(default_factory=G2OptimisationConfig)
    data: G2DataConfig
    run: RunConfig
    evaluate: G2EvaluateConfig = field(default_factory=G2EvaluateConfig)
    deepspeed: str | None = None  # zero1, zero2, or a DeepSpeed file; null: plain PyTorch or DDP

    def __post_init__(self) -> None:
        if self.loss.text_weight and not self.data.questions:
            raise ValueError(
                f"loss.text_weight = {self.loss.text_weight} needs data.questions; name a folder of records"
            )
        if self.data.questions and not self.loss.text_weight:
            raise ValueError("data.questions is not trained on with loss.text_weight = 0; give it a weight")
        if self.gasp.weight and not self.data.questions:
            raise ValueError(f"gasp.weight = {self.gasp.weight} needs data.questions, whose images it supervises")
        if self.train.mode == "semantic" and self.loss.geometry_weight:
            raise ValueError("train.mode = 'semantic' keeps the geometric expert as it is; set loss.geometry_weight=0")
        if self.train.mode == "geometric" and not self.loss.geometry_weight:
            raise ValueError("train.mode = 'geometric' trains on geometry alone; give loss.geometry_weight a weight")
        for name in self.run.allow_changes:
            if name not in keys_of(G2TrainConfig):
                raise ValueError(f"run.allow_changes names {name!r}, which is no key of a G²VLM recipe")
