"""GASP as the training loop sees it: a vision-language model whose layers are supervised by real geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gasp_fast.backbones import Backbone
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.dealing import DealtStep, Division
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.micro_batch_time import MicroBatchSeconds
from gasp_fast.supervision.geometric import SupervisedLayers
from gasp_fast.supervision.heads import CorrespondenceHeads

from . import dry_run, guards
from .config import TrainConfig
from .distributed import Processes
from .held_out import HeldOutSequences, gathered_together
from .loader import make_loader
from .model import SupervisedModel, build_model
from .objective import Batch, Objective, Record, Term
from .optim import Group, Schedule, make_optimizer, trained_groups
from .same_run import AT_BEGINNING, EVERY_RUN, SHAPES, WEIGHTS, Rules, run_facts
from .sizes import PredictedSizes
from .stream import Dealer, SampleStream, Share
from .weights import TrainedWeights, gather_weights, read_weights, write_weights
from .workload import BatchFlops

RULES = Rules(
    free=(*EVERY_RUN.free, "data.qa.timeout", "data.vqa.timeout"),
    rounding=(
        *EVERY_RUN.rounding, "train.micro_batch_size", "train.packing", "train.checkpointing", "model.attention",
        "model.liger", "loss.workspace",
    ),
    fixed={
        **EVERY_RUN.fixed,
        "lora.rank": SHAPES,
        "heads.layers": SHAPES,
        "heads.kind": WEIGHTS,
        "heads.mid_size": SHAPES,
        "heads.out_size": SHAPES,
        "heads.init": AT_BEGINNING,
        "heads.bias": AT_BEGINNING,
        "loss.learnable_temperature": WEIGHTS,
    },
)  # fmt: skip


class TrackedSequences(HeldOutSequences, Protocol):
    """Sequences to evaluate on, which run the model themselves: `gasp_fast/evaluation/held_out.py`."""

    def usable(self, backbone: Backbone, indices: Iterable[int]) -> list[int]:
        """Those of `indices` that can be evaluated."""

    def outcomes(
        self,
        backbone: Backbone,
        model: nn.Module,
        heads: CorrespondenceHeads | None,
        indices: Sequence[int],
        device: torch.device,  # ZeRO-3 may keep the weights elsewhere
    ) -> Mapping[int, Any]:
        """Scored predictions by index. Runs the model once for each of `indices`."""


COUNTS = ("answered", "matched")  # steps that have labelled tokens, and matches


def terms(layers: int) -> tuple[Term, ...]:
    """What the log shows of a model with so many supervised layers."""
    return (
        Term("lm", "answered"),
        Term("corr", "matched", layers),
        Term("depth", "matched", layers),
        Term("pck", "matched", layers, is_loss=False),
        Term("cosine", "matched", layers, is_loss=False),
    )


class Gasp(Objective):
    """Trains a `SupervisedModel` on a `SampleStream`."""

    counts = COUNTS
    next_command = "gasp-fast export {model}; gasp-fast evaluate --model {model} --scenes DIR"
    config: TrainConfig
    model: SupervisedModel
    stream: SampleStream
    sequences: TrackedSequences | None

    def __init__(
        self,
        config: TrainConfig,
        stream: SampleStream,
        sequences: TrackedSequences | None = None,
        model: SupervisedModel | None = None,  # None: `build` makes it
    ) -> None:
        self.config, self.stream, self.sequences = config, stream, sequences
        if model is not None:
            self.take(model)

    @property
    def steps(self) -> int:
        return self.config.train.steps_of(self.stream.epoch)

    def share(self, processes: Processes) -> Share:
        return Share.of(self.config.train, processes.rank, processes.world_size)

    def build(self, device: torch.device) -> None:
        model = build_model(self.config, device)
        guards.check_seen_parts(self.stream, model.backbone)
        if self.config.train.mode == "lora":
            guards.check_adapters(model)
        self.head_seconds = model.head_seconds
        self.take(model)

    def take(self, model: SupervisedModel) -> None:
        """Train this model, which is not sharded yet."""
        config, self.model = self.config, model
        self.dtype, self.hidden_size = model.dtype, model.backbone.hidden_size
        # Every trained weight takes part in every step (`model.py`), except for those that a model itself never uses,
        # of which a fully trained one may have some.
        self.may_skip_weights = config.train.mode == "full"
        self.terms = terms(0 if model.supervision is None else len(model.supervision.layers))
        self.batch_flops = BatchFlops(config, model)

    # ---- before the first step --------------------------------------------------------------------------------------

    def groups(self) -> Iterator[Group]:
        return trained_groups(self.model)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.groups(), self.config.train)

    def schedule(self, steps: int) -> Schedule:
        return Schedule.of(self.config.train.warmup, steps)

    def prepare_for_deepspeed(self) -> None:
        """Let ZeRO-3 gather the weights of all heads at once and keep them until their gradients are computed."""
        from deepspeed.utils import set_z3_leaf_modules

        if any(isinstance(module, SupervisedLayers) for module in self.model.modules()):
            set_z3_leaf_modules(self.model, [SupervisedLayers])

    def loader(self, share: Share, steps: int, done: int, pin_memory: bool) -> DataLoader[Any]:
        data, average, packing = self.config.data, self.config.loss.average, self.config.train.packing
        backbone = self.model.backbone
        return make_loader(data, self.stream, backbone, share, steps, pin_memory, done, average, packing)

    def deal(self, share: Share, processes: Processes) -> Callable[[int], DealtStep]:
        """By predicted cost."""
        frame_sizes = processes.decided_by_first(self.stream.frame_sizes)
        sizes = PredictedSizes(self.config, self.model.backbone, self.stream, frame_sizes)
        layers: Any = self.model.backbone.decoder_layers(self.model.model)
        kept = sum(not layer.gradient_checkpointing for layer in layers)
        setup = replace(self.batch_flops.setup, kept_layers=kept)
        # Of one GPU, whichever trains: only the ratios of costs matter, and all processes must deal alike.
        seconds = MicroBatchSeconds(setup, GPUS["h200"], Assumptions())
        return Dealer(share.batch_size, sizes, Division.of(setup, processes.world_size), seconds).deal

    def learning_guard(self) -> guards.LearningGuard:
        return guards.LearningGuard(self.model)

    def describe(self, share: Share, processes: Processes) -> str:
        return dry_run.describe(self.config, self.model, share, processes)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def check_first(self, batch: Batch) -> None:
        guards.check_positions(self.model, batch)

    def flops(self, batch: Batch) -> float:
        return self.batch_flops(batch)

    def tokens(self, batch: Batch) -> int:
        tokens: int = batch["input_ids"].numel()
        return tokens

    def logged(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        return super().logged(outputs, batch) if len(batch["matches"]) else {"lm": outputs["lm"]}

    def score(self, record: Record) -> float | None:
        """Mean PCK of the layers; without heads, minus the LM loss."""
        pck = [value for value in record["pck_per_layer"] if value is not None]
        if pck:
            return float(sum(pck) / len(pck))
        return None if record["pck_per_layer"] or record["lm"] is None else -float(record["lm"])

    # ---- evaluation and checkpoints ---------------------------------------------------------------------------------

    def usable(self, indices: Sequence[int]) -> list[int]:
        assert self.sequences is not None
        return self.sequences.usable(self.model.backbone, indices)

    def outcomes(self, indices: Sequence[int], device: torch.device) -> Mapping[int, Any]:
        assert self.sequences is not None
        model = self.model
        heads = None if model.supervision is None else model.supervision.heads
        with gathered_together(heads):
            return self.sequences.outcomes(model.backbone, model.model, heads, indices, device)

    def gather_weights(self, processes: Processes, in_place: bool = False) -> TrainedWeights:
        return gather_weights(self.model, processes, in_place)

    def write_weights(self, folder: Path, weights: TrainedWeights) -> None:
        write_weights(self.model, folder, weights)

    def read_weights(self, folder: Path) -> None:
        read_weights(self.model, folder)

    def facts(self) -> dict[str, Any]:
        return run_facts(self.config.model.source, self.stream, self.steps)

    @property
    def rules(self) -> Rules:
        if not self.config.loss.learnable_temperature:
            return RULES
        return replace(RULES, fixed={**RULES.fixed, "loss.temperature": AT_BEGINNING})
