"""Time of an optimiser step, by part.

Parts run one after the other. Each is a sum of the `Work` in `work.py`, times its factor in `Assumptions` if a step has
been measured. The loss's products have the embeddings' type; for fp32 embeddings that is IEEE fp32, not tf32.

`idle` is the time that a GPU waits for its host, which starts the operations of a micro-batch one after another.

Sequences are of unequal length. Within a micro-batch the shorter ones are padded (`padding`), and GPUs wait for the
slowest of them (`waiting`). Both are those of some steps whose sequences are drawn at random and dealt as in training
(`dealing.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .assumptions import Assumptions
from .dealing import Division, deal
from .gpus import GPU
from .micro_batch_time import MicroBatchSeconds, host_seconds, seconds_of, sequence_seconds
from .training_setup import SequenceMix, TrainingSetup
from .work import work_of_micro_batch

OVERHEADS = ("padding", "waiting", "communication", "optimiser", "idle")  # parts of a step that belong to no sequence
NODE = 8  # GPUs of a node
DRAWN = 16  # steps, whose sequences are dealt; their mean is within 1 % of that of many


@dataclass(frozen=True)
class DealtSteps:
    """Means of some steps with random sequences, dealt to the GPUs."""

    accumulation: float  # micro-batches of a GPU
    padding: float  # seconds in which a GPU computes padding
    mean: float  # seconds in which it computes, padding included
    slowest: float  # seconds until all have done so

    @property
    def useful_share(self) -> float:
        return self.mean / self.slowest


def deal_some_steps(
    setup: TrainingSetup, mix: SequenceMix, gpus: int, gpu: GPU, assumptions: Assumptions, steps: int = DRAWN
) -> DealtSteps:
    """Draw and deal the sequences of some steps, always the same ones."""
    seconds, draw = MicroBatchSeconds(setup, gpu, assumptions), random.Random(0)
    division = Division.of(setup, gpus)
    shares, sizes = [share for share, _ in mix], [size for _, size in mix]
    dealt = [deal(draw.choices(sizes, shares, k=setup.batch_size), division, seconds) for _ in range(steps)]
    return DealtSteps(
        accumulation=sum(step.accumulation for step in dealt) / steps,
        padding=sum(step.padding for step in dealt) / steps,
        mean=sum(step.mean for step in dealt) / steps,
        slowest=sum(step.slowest for step in dealt) / steps,
    )


def step_seconds(
    setup: TrainingSetup,
    mix: SequenceMix,
    gpus: int,
    gpu: GPU,
    assumptions: Assumptions,
    dealt: DealtSteps | None = None,
) -> dict[str, float]:
    """Seconds of an optimiser step by part: of the mean sequence, and `OVERHEADS`."""
    dealt = deal_some_steps(setup, mix, gpus, gpu, assumptions) if dealt is None else dealt
    step: dict[str, float] = {}
    for share, size in mix:
        for part, value in sequence_seconds(setup, size, gpu, assumptions).items():
            step[part] = step.get(part, 0.0) + setup.batch_size / gpus * share * value
    for part, value in seconds_of(setup, work_of_micro_batch(setup), gpu, assumptions).items():
        step[part] += dealt.accumulation * value
    computed = sum(step.values())  # of the mean sequence; those that were drawn differ a little
    step["padding"] = computed * dealt.padding / (dealt.mean - dealt.padding)
    step["waiting"] = (computed + step["padding"]) * (dealt.slowest / dealt.mean - 1)
    slowest_computes = sum(step.values())
    step["communication"] = _communication_seconds(setup, dealt.accumulation, gpus, gpu, assumptions)
    step["optimiser"] = optimiser_seconds(setup, gpus, gpu, assumptions)
    step["idle"] = max(0.0, dealt.accumulation * host_seconds(setup, assumptions) - slowest_computes)
    return step


def communication_bytes(setup: TrainingSetup, accumulation: float) -> float:
    """Bytes that each GPU sends in an optimiser step, without the factor (gpus - 1) / gpus."""
    count, stage = setup.parameters, setup.sharding.stage
    trained = 4.0 * count.trained
    if stage < 2:
        return 2 * trained  # gradients once, then weights
    if stage == 2:
        return (accumulation + 1) * trained  # gradients of every micro-batch
    gathers = 3 if setup.checkpointing else 2
    return accumulation * (trained + gathers * (trained + setup.element_bytes * count.frozen))


def _communication_seconds(
    setup: TrainingSetup, accumulation: float, gpus: int, gpu: GPU, assumptions: Assumptions
) -> float:
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= NODE else min(gpu.link, gpu.network)  # a ring through all is as fast as its slowest hop
    sent = communication_bytes(setup, accumulation) * (gpus - 1) / gpus
    return assumptions.exposed * sent / (speed * assumptions.link)


def optimiser_seconds(setup: TrainingSetup, gpus: int, gpu: GPU, assumptions: Assumptions) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them: 28 bytes, and 8 more to clip."""
    trained, sharding = setup.parameters.trained, setup.sharding
    own = trained / gpus if sharding.stage >= 1 else trained
    bandwidth = assumptions.cpu_bandwidth if sharding.optimiser_on_cpu else gpu.bandwidth * assumptions.optimiser
    return assumptions.factors.get("optimiser", 1.0) * 36.0 * own / bandwidth
