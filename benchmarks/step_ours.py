"""Our training step, one at a time, on a base model that several cases share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from step_cases import STEPS
from step_pauses import activities_recorded, pauses
from step_profile import kernels_by_part, profiled, seconds_by_part, what_ran
from step_trainer import ROW, Clock, empty_cache, peak_memory, reset_peak, synchronize
from transformers import AutoModelForImageTextToText

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.base_model import choose_attention, use_fast_modules
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.distributed import Processes
from gasp_fast.training.gasp import Gasp
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import SupervisedModel, stored_dtype, supervise
from gasp_fast.training.stream import SampleStream, Share


class Base:
    """A base model with random weights, created on `device`, so that 16 GB are not copied from the CPU."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.backbone = load_backbone(config.model.source)
        before = allocated()
        torch.manual_seed(0)
        with torch.device(device):
            self.model = AutoModelForImageTextToText.from_config(
                self.backbone.config,
                dtype=stored_dtype(config),
                attn_implementation=choose_attention(config.model, device),
            )
        self.bytes = allocated() - before

    def copy(self) -> Any:
        """Another model with the same weights in the same memory; they are frozen."""
        return copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})


class OurSteps:
    """Takes single steps of the training loop, with the same interface as `PlainTrainer`."""

    def __init__(self, config: TrainConfig, base: Base, batches: list[dict[str, Any]], processes: Processes) -> None:
        self.base, self.batches, self.taken = base, batches, 0
        before = allocated()
        model = build_model(config, base, processes.device)
        share = Share(0, 1, config.train.batch_size, config.train.micro_batch_size)
        self.loop = TrainingLoop(Gasp(config, SampleStream(config.data), model=model), share, STEPS, processes)
        self.own = allocated() - before  # memory of this model alone: heads, adapters, their optimiser

    def ask(self, what: str) -> dict[str, Any]:
        """Do "step", "profile" or "pauses" (of a step), "row" (`ROW` steps), or "rest" (free what is not needed).

        Returns what was measured.
        """
        if what == "rest":
            empty_cache()
            return {}
        self.taken += 1
        before = allocated()
        others = before - self.own - self.base.bytes
        reset_peak()
        clock = Clock()
        record = self._profile() if what == "profile" else self._pauses() if what == "pauses" else {}
        if what == "step":
            self.loop.train_step(self.taken, self.batches)
        if what == "row":
            for number in range(self.taken, self.taken + ROW):
                self.loop.train_step(number, self.batches)
            self.taken += ROW - 1
        peak = peak_memory()
        record |= {**clock.read(), "peak_memory": None if peak is None else peak - others}
        self.own += allocated() - before
        return record

    def _profile(self) -> dict[str, Any]:
        with what_ran(self.loop.objective.model) as ran, profiled(self.loop.objective.model) as measured:
            self.loop.train_step(self.taken, self.batches)
            synchronize()
        parts, attention = seconds_by_part(measured)
        kernels = kernels_by_part(measured)
        return {"seconds_by_part": parts, "kernels_by_part": kernels, "attention_operations": attention, **ran}

    def _pauses(self) -> dict[str, Any]:
        with activities_recorded() as activities:
            self.loop.train_step(self.taken, self.batches)
        return {"pauses": pauses(activities)}

    def close(self) -> None:
        self.loop.state.accelerator.free_memory()


def build_model(config: TrainConfig, base: Base, device: torch.device) -> SupervisedModel:
    """The model of a case."""
    model = base.copy()
    torch.manual_seed(0)
    with torch.device(device):
        use_fast_modules(base.backbone, model, config.model)
        return supervise(config, base.backbone, model, device)


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
