"""Which costs a training step avoids. The estimate of its time depends on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepDesign:
    """The defaults are this package's step; `FIRST_MEASURED` had none of it.

    What a recipe chooses (recomputation, precisions, Liger's layers) is in `TrainingSetup`.
    """

    frozen_tower: bool = (
        True  # a vision tower that is not trained runs once, without a graph; else as if it were trained
    )
    padded_tower: bool = True  # its MLPs are padded to a multiple of 64; other widths get slow kernels
    fused_tower: bool = True  # Qwen's norms, rotary and SwiGLU in one kernel each, windows without gather and scatter
    cast_once: bool = True  # adapters once a step, their inputs not at all; else both at every use
    coordinates: bool = True  # of heads in bf16, at half of their width, are what the loss compares
    loss_blocks: bool = True  # the loss computes blocks of a thousand rows and more; else few rows, in many calls


# Commit f722f58, measured in benchmarks/results/h200-2026-11-26/step-*.json.
FIRST_MEASURED = StepDesign(
    frozen_tower=False, padded_tower=False, fused_tower=False, cast_once=False, coordinates=False, loss_blocks=False
)  # fmt: skip
