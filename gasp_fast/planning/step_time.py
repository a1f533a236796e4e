"""Time of an optimiser step, by part.

Parts run one after the other. Each is a sum of the `Work` in `work.py`, times its factor in `Assumptions` if a step has
been measured. The loss's products have the embeddings' type; for fp32 embeddings that is IEEE fp32, not tf32.

`idle` is the time that a GPU waits for its host, which starts the operations of a micro-batch one after another.

GPUs wait for each other, and sequences are of unequal length: of many GPUs one nearly always draws the longest.
`waiting` is the expected excess of the slowest over the mean. From ZeRO-2 on GPUs meet at every micro-batch, otherwise
once a step, and the excess of a sum of draws grows like the square root of their number.
"""

from __future__ import annotations

from collections.abc import Iterable

from .assumptions import Assumptions
from .gpus import GPU
from .training_setup import SequenceMix, SequenceSize, TrainingSetup
from .work import Work, operations, work_of_micro_batch, work_of_sequence

OVERHEADS = ("waiting", "communication", "optimiser", "idle")  # parts of a step that belong to no sequence
NODE = 8  # GPUs of a node


def step_seconds(
    setup: TrainingSetup, mix: SequenceMix, gpus: int, gpu: GPU, assumptions: Assumptions
) -> dict[str, float]:
    """Seconds of an optimiser step by part: of the mean sequence, and `OVERHEADS`."""
    sizes = [(share, sequence_seconds(setup, size, gpu, assumptions)) for share, size in mix]
    mean = {part: sum(share * seconds[part] for share, seconds in sizes) for part in sizes[0][1]}
    slowest = expected_slowest([(share, sum(seconds.values())) for share, seconds in sizes], gpus)

    accumulation, batch = setup.accumulation(gpus), setup.micro_batch_size
    step = {part: accumulation * batch * value for part, value in mean.items()}
    for part, value in seconds_of(setup, work_of_micro_batch(setup), gpu, assumptions).items():
        step[part] += accumulation * value
    meetings = accumulation if setup.sharding.stage >= 2 else accumulation**0.5
    step["waiting"] = max(0.0, slowest - sum(mean.values())) * meetings * batch**0.5
    slowest_computes = sum(step.values())
    step["communication"] = _communication_seconds(setup, gpus, gpu, assumptions)
    step["optimiser"] = optimiser_seconds(setup, gpus, gpu, assumptions)
    step["idle"] = max(0.0, accumulation * host_seconds(setup, assumptions) - slowest_computes)
    return step


def sequence_seconds(
    setup: TrainingSetup, sequence: SequenceSize, gpu: GPU, assumptions: Assumptions
) -> dict[str, float]:
    """Seconds of one GPU on one sequence, by part."""
    return seconds_of(setup, work_of_sequence(setup, sequence), gpu, assumptions)


def seconds_of(setup: TrainingSetup, work: Iterable[Work], gpu: GPU, assumptions: Assumptions) -> dict[str, float]:
    """Seconds of one GPU on this work, by part."""
    peaks = {"bf16": gpu.bf16, "tf32": gpu.tf32, "fp32": gpu.fp32}
    own = {"heads": setup.head_precision, "geometric loss": setup.embedding_precision}
    seconds: dict[str, float] = {}
    for one in work:
        rate = peaks[own.get(one.part, setup.precision)] * getattr(assumptions, one.rate)
        moving = one.bytes / (gpu.bandwidth * getattr(assumptions, one.speed))
        took = assumptions.factors.get(one.part, 1.0) * (one.flops / rate + moving + one.seconds)
        seconds[one.part] = seconds.get(one.part, 0.0) + took
    return seconds


def host_seconds(setup: TrainingSetup, assumptions: Assumptions) -> float:
    """Seconds that the host takes to start the operations of a micro-batch."""
    return assumptions.factors.get("host", 1.0) * assumptions.operation * operations(setup)


def expected_slowest(times: list[tuple[float, float]], ranks: int) -> float:
    """The largest of `ranks` independent draws from (probability, seconds), in expectation."""
    expected = below = 0.0
    for probability, duration in sorted(times, key=lambda one: one[1]):
        upto = below + probability
        expected += duration * (min(upto, 1.0) ** ranks - below**ranks)
        below = upto
    return expected


def communication_bytes(setup: TrainingSetup, accumulation: int) -> float:
    """Bytes that each GPU sends in an optimiser step, without the factor (gpus - 1) / gpus."""
    count, stage = setup.parameters, setup.sharding.stage
    trained = 4.0 * count.trained
    if stage < 2:
        return 2 * trained  # gradients once, then weights
    if stage == 2:
        return (accumulation + 1) * trained  # gradients of every micro-batch
    gathers = 3 if setup.checkpointing else 2
    return accumulation * (trained + gathers * (trained + setup.element_bytes * count.frozen))


def _communication_seconds(setup: TrainingSetup, gpus: int, gpu: GPU, assumptions: Assumptions) -> float:
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= NODE else min(gpu.link, gpu.network)  # a ring through all is as fast as its slowest hop
    sent = communication_bytes(setup, setup.accumulation(gpus)) * (gpus - 1) / gpus
    return assumptions.exposed * sent / (speed * assumptions.link)


def optimiser_seconds(setup: TrainingSetup, gpus: int, gpu: GPU, assumptions: Assumptions) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them: 28 bytes, and 8 more to clip."""
    trained, sharding = setup.parameters.trained, setup.sharding
    own = trained / gpus if sharding.stage >= 1 else trained
    bandwidth = assumptions.cpu_bandwidth if sharding.optimiser_on_cpu else gpu.bandwidth * assumptions.optimiser
    return assumptions.factors.get("optimiser", 1.0) * 36.0 * own / bandwidth
