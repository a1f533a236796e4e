"""Estimates memory, FLOPs and time of a run. Every number in it is one of

    counted    from shapes: parameters, FLOPs, bytes; tests compare them with the real modules
    stated     by a vendor: `gpus.py`
    assumed    efficiencies and what the data holds: `Assumptions`; a measured step corrects the time of each part

Memory is that of the longest sequence, time that of the mean one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .assumptions import Assumptions
from .flops import Flops, mean_flops
from .gpus import GPU
from .memory import memory_by_purpose
from .step_time import OVERHEADS, DealtSteps, deal_some_steps, step_seconds
from .training_setup import SequenceMix, SequenceSize, TrainingSetup, longest_sequence

PAPER_SEQUENCES = 1_750_000  # "annotations"; `readings.py` has other meanings
PAPER_QUESTIONS = 100_000
PAPER_GPU_HOURS = 10 * 32  # of an H200
PAPER_RATE = PAPER_SEQUENCES * 3 / (PAPER_GPU_HOURS * 3600)  # sequences a second on each H200: 4.6


class Totals:
    """What follows from the parts of an estimate."""

    gpu: GPU
    memory: dict[str, float]  # bytes of a GPU by purpose
    seconds: dict[str, float]  # of an optimiser step, by part

    @property
    def memory_needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_needed <= self.gpu.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Plan(Totals):
    """The estimate of a run."""

    setup: TrainingSetup
    mix: SequenceMix
    longest: SequenceSize
    steps: int
    gpus: int
    gpu: GPU
    memory: dict[str, float]  # bytes on each GPU, by purpose
    flops: dict[str, Flops]  # of the mean sequence, by part of the model
    dealt: DealtSteps  # how evenly the sequences of a step are dealt to the GPUs
    seconds: dict[str, float]  # of an optimiser step, by part

    @property
    def mean_tokens(self) -> float:
        return sum(share * size.tokens for share, size in self.mix)

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame."""
        return self.longest.visual // self.longest.frames

    @property
    def geometry_share(self) -> float:
        """Share of heads and geometric loss in the time that a GPU computes."""
        computing = sum(value for part, value in self.seconds.items() if part not in OVERHEADS)
        return (self.seconds["heads"] + self.seconds["geometric loss"]) / computing

    @property
    def mfu(self) -> float:
        """Model FLOPs over what a GPU could do at its bf16 peak in the time of a step."""
        needed = self.setup.batch_size / self.gpus * sum(flops.model for flops in self.flops.values())
        return needed / self.step_seconds / self.gpu.bf16

    @property
    def rate(self) -> float:
        """Sequences a second on each GPU."""
        return self.setup.batch_size / self.step_seconds / self.gpus

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


def make_plan(
    setup: TrainingSetup, mix: SequenceMix, steps: int, gpus: int, gpu: GPU, assumptions: Assumptions
) -> Plan:
    """The estimate of a run of `steps` optimiser steps on `gpus` GPUs."""
    if setup.tokens_at_once is None:
        setup.accumulation(gpus)  # first of all: whether the batch divides over the GPUs
    longest = longest_sequence(mix)
    dealt = deal_some_steps(setup, mix, gpus, gpu, assumptions)
    return Plan(
        setup=setup,
        mix=mix,
        longest=longest,
        steps=steps,
        gpus=gpus,
        gpu=gpu,
        memory=memory_by_purpose(setup, longest, gpus, assumptions),
        flops=mean_flops(setup, mix),
        dealt=dealt,
        seconds=step_seconds(setup, mix, gpus, gpu, assumptions, dealt),
    )


def tokens_at_rate(rate: float, plan_at: Callable[[int], Plan]) -> int | None:
    """The most tokens a frame may have for `rate` sequences a second on each GPU; None if even one is too many.

    `plan_at` makes the plan of the run with that many tokens a frame.
    """
    low, high = 0, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan_at(middle).rate >= rate else (low, middle - 1)
    return low or None
