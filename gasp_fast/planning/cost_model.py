"""What a run will cost, before anybody pays for it: memory, operations and time from shapes, in writing.

Knows shapes, counts and data sheets; must not know how any of it is computed, and runs nothing. Every number is one of

    counted    from shapes: parameters and operations (`workload.py`), bytes; tests compare them with real modules
    stated     by a vendor: `GPUS`
    assumed    efficiencies and what the data holds: `Assumptions`, not yet measured on a GPU; a measured step replaces
               them (`calibration.py`)

Memory of a GPU: weights, gradients, optimiser states, saved activations, and the largest working set on top. Whatever
is trained is fp32 (4 bytes of weight, 4 of gradient, 8 of moments, 4 more of DeepSpeed's own copy, 2 of the bf16 copy
that autocast keeps); ZeRO shares out states from stage 1, gradients from stage 2, weights in stage 3. Memory is that
of the longest sequence, time that of the mean one.

Time: operations over the peak of their precision times an efficiency, one after the other, and the traffic of
everything that is no product: each saved activation is written once and read once going forward, twice that going
backward. The loss's products take the embeddings' type, and fp32 embeddings mean IEEE fp32, not tf32.

Ranks wait for each other, and sequences are of unequal length: with many ranks one of them nearly always draws the
longest. `waiting` is the expected excess of the slowest over the mean. From ZeRO-2 on they meet at every micro-batch;
otherwise once a step, and the excess of a sum of draws grows like the square root of their number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gasp_fast.training.config import TrainConfig

from .shapes import PATCHES, ModelShape
from .workload import (
    Assumptions,
    Operations,
    Sequence,
    frame_tokens_of,
    head_parameters,
    head_sizes,
    operations,
    parameters,
    sequences_of,
    supervised_layers,
)

PAPER_RATE = 1.75e6 * 3 / (10 * 3600 * 32)  # sequences a second on each H200, as the paper's totals imply: 4.6
PAPER_SEQUENCES = 1_750_000


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Dense peaks and bandwidths from the vendor's data sheet, per second."""

    memory: float  # bytes
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float  # bytes, of its memory
    link: float  # bytes, to the others of its node, one way
    network: float = 8 * 50e9  # bytes, out of a node of eight, one way: 400 Gbit/s for each GPU


GPUS = {
    "a100": GPU(memory=80e9, bf16=312e12, tf32=156e12, fp32=19.5e12, bandwidth=2.04e12, link=300e9, network=200e9),
    "h100": GPU(memory=80e9, bf16=989e12, tf32=495e12, fp32=67e12, bandwidth=3.35e12, link=450e9),
    "h200": GPU(memory=141e9, bf16=989e12, tf32=495e12, fp32=67e12, bandwidth=4.8e12, link=450e9),
    "b200": GPU(memory=180e9, bf16=2250e12, tf32=1125e12, fp32=75e12, bandwidth=7.7e12, link=900e9),
}


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """What a DeepSpeed file says about memory."""

    stage: int = 0
    deepspeed: bool = False
    optimiser_on_cpu: bool = False
    weights_on_cpu: bool = False

    @staticmethod
    def of(path: str | None) -> Sharding:
        if path is None:
            return Sharding()
        zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        on_cpu = [zero.get(key, {}).get("device") == "cpu" for key in ("offload_optimizer", "offload_param")]
        return Sharding(int(zero.get("stage", 0)), True, *on_cpu)


def activation_bytes(config: TrainConfig, shape: ModelShape) -> float:
    """Saved for backward by one decoder layer, for each token; counted from what autograd saves.

    Norms save their input in fp32. Each adapter keeps its own bf16 copy of its input, the products between frozen
    weights none; where weights are trained the residual stream is fp32, and every product keeps its input.
    """
    d, ff, q, kv = shape.hidden, shape.intermediate, shape.query_width, shape.key_width
    element = 2 if config.model.dtype == "bf16" else 4
    statistics = 4 * shape.query_heads + 8
    if config.train.mode == "full":
        return 16 * d + element * (5 * d + 4 * ff + 2 * q + 2 * kv) + statistics
    return 8 * d + element * (3 * d + 3 * ff + 3 * q + 2 * kv + 4 * config.lora.rank) + statistics


def memory(
    config: TrainConfig, shape: ModelShape, longest: Sequence, gpus: int, given: Assumptions
) -> dict[str, float]:
    """Bytes on each GPU, by purpose."""
    count, sharding = parameters(config, shape), Sharding.of(config.deepspeed)
    trained = count["model"] + count["adapters"] + count["heads"]
    element = 2 if config.model.dtype == "bf16" else 4
    stage, batch = sharding.stage, config.train.micro_batch_size
    full = config.train.mode == "full"

    def share(bytes_: float, from_stage: int) -> float:
        return bytes_ / gpus if stage >= from_stage else bytes_

    states = 0.0 if sharding.optimiser_on_cpu else share((12 if sharding.deepspeed else 8) * trained, 1)
    weights = 0.0 if sharding.weights_on_cpu else 1.0
    gathered = min(1e9, count["frozen"] + trained) * element if stage == 3 else 0.0
    cast = 2 * (count["model"] + count["adapters"]) if element == 2 else 0  # autocast's copies
    residual = 4 if full else element
    per_token = activation_bytes(config, shape)
    tokens = batch * longest.tokens
    if config.train.checkpointing == "off":
        saved = tokens * per_token * shape.layers
        at_work = 0.5 * tokens * per_token
    else:
        saved = tokens * residual * shape.hidden * shape.layers
        at_work = 1.5 * tokens * per_token  # one layer again, and its gradients
    vision_saved, vision_at_work = _vision_memory(config, shape, batch * longest.visual)
    heads_kept, heads_at_work = _head_memory(config, shape, batch * longest.tracked, residual)
    logits = batch * given.labelled * shape.vocabulary * 12.0
    items = {
        "frozen weights": weights * share(element * count["frozen"], 3),
        "trained weights": weights * share(4.0 * trained, 3) + cast,
        "gathered weights": gathered,
        "gradients": 0.0 if sharding.optimiser_on_cpu and stage >= 2 else share(4.0 * trained, 2),
        "optimiser": states,
        "saved activations": saved + vision_saved,
        "kept by heads": heads_kept,
        "working set": max(at_work, heads_at_work, logits, vision_at_work),
    }
    items["fragmentation"] = given.fragmentation * sum(items.values())
    items["reserve"] = given.reserve
    return items


def _vision_memory(config: TrainConfig, shape: ModelShape, visual: int) -> tuple[float, float]:
    """Saved by the vision tower, and its largest working set. A frozen tower saves nothing."""
    patches, element = PATCHES * visual, 2 if config.model.dtype == "bf16" else 4
    block = element * (8.0 * shape.vision_hidden + 4.0 * shape.vision_intermediate)
    if config.train.mode != "full":
        return 0.0, patches * block
    if config.train.checkpointing == "off":
        return patches * 2 * block * shape.vision_layers, patches * block
    return patches * 4.0 * shape.vision_hidden * shape.vision_layers, patches * 3 * block


def _head_memory(config: TrainConfig, shape: ModelShape, tracked: int, residual: int) -> tuple[float, float]:
    """Kept until backward (the gradients that were computed in forward), and at work in one layer."""
    layers = len(supervised_layers(config, shape))
    middle, out = head_sizes(config, shape)
    kept = layers * tracked * shape.hidden * residual + 4.0 * head_parameters(config, shape)
    at_work = tracked * (12.0 * shape.hidden + 16.0 * middle + 8.0 * out) + (128 << 20)
    return kept, at_work if layers else 0.0


# ---- time -----------------------------------------------------------------------------------------------------------


def seconds(
    config: TrainConfig, shape: ModelShape, sequence: Sequence, gpu: GPU, given: Assumptions
) -> dict[str, float]:
    """Of one GPU on one sequence, by part."""
    base = gpu.bf16 if config.model.dtype == "bf16" else gpu.fp32
    loss = gpu.bf16 if config.heads.compute == "bf16" else gpu.fp32
    rates = {
        "decoder": base * given.decoder,
        "attention": base * given.attention,
        "adapters": base * given.adapters,
        "vision": base * given.vision,
        "lm head": base * given.decoder,
        "heads": getattr(gpu, config.heads.compute) * given.heads,
        "geometric loss": loss * given.loss,
    }
    found = {name: ops.total / rates[name] for name, ops in operations(config, shape, sequence).items()}
    passes = 3 if config.train.checkpointing == "off" else 4  # forward, twice that backward, forward again
    traffic = 2.0 * passes * sequence.tokens * activation_bytes(config, shape) * shape.layers
    found["norms, activations"] = traffic / (gpu.bandwidth * given.bandwidth)
    return found


def expected_slowest(times: list[tuple[float, float]], ranks: int) -> float:
    """Of `ranks` independent draws from (probability, seconds)."""
    expected = below = 0.0
    for probability, duration in sorted(times, key=lambda one: one[1]):
        upto = below + probability
        expected += duration * (min(upto, 1.0) ** ranks - below**ranks)
        below = upto
    return expected


def communication_bytes(config: TrainConfig, shape: ModelShape, accumulation: int) -> float:
    """Sent by each GPU in an optimiser step, but for a factor (gpus - 1) / gpus."""
    count, stage = parameters(config, shape), Sharding.of(config.deepspeed).stage
    trained = 4.0 * (count["model"] + count["adapters"] + count["heads"])
    if stage < 2:
        return 2 * trained  # gradients once, then weights
    if stage == 2:
        return (accumulation + 1) * trained  # gradients of every micro-batch
    element = 2 if config.model.dtype == "bf16" else 4
    gathers = 2 if config.train.checkpointing == "off" else 3
    return accumulation * (trained + gathers * (trained + element * count["frozen"]))


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe costs on so many GPUs."""

    gpus: int
    frame_tokens: int
    mean_tokens: float  # of a sequence
    longest_tokens: int
    parameters: dict[str, int]
    memory: dict[str, float]  # bytes
    capacity: float  # bytes
    operations: dict[str, Operations]  # of the mean sequence
    seconds: dict[str, float]  # of an optimiser step, by part; with waiting, communication, optimiser, idle
    geometry_share: float  # of the computing time
    batch_size: int
    steps: int
    mfu: float  # operations without recomputation over the peak
    notes: tuple[str, ...]

    @property
    def bytes_needed(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Sequences a second on each GPU."""
        return self.batch_size / self.step_seconds / self.gpus

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


def make_plan(
    config: TrainConfig,
    shape: ModelShape,
    gpus: int,
    gpu: GPU,
    given: Assumptions | None = None,
    frame_tokens: int | None = None,
    sequences: int | None = None,
) -> Plan:
    """`frame_tokens` and `sequences` (of an epoch of the first source) replace what the recipe implies."""
    given = Assumptions() if given is None else given
    once = gpus * config.train.micro_batch_size
    if gpus < 1 or config.train.batch_size % once:
        raise ValueError(
            f"train.batch_size = {config.train.batch_size} does not divide over gpus = {gpus} with "
            f"train.micro_batch_size = {config.train.micro_batch_size}; use a multiple of {once}"
        )
    accumulation = config.train.batch_size // once
    frame_tokens = frame_tokens or frame_tokens_of(config, shape, given)
    kinds = sequences_of(config, frame_tokens, given)
    longest = max(kinds, key=lambda kind: kind.tokens)

    of_kind = [seconds(config, shape, kind, gpu, given) for kind in kinds]
    mean = {part: sum(k.share * of[part] for k, of in zip(kinds, of_kind, strict=True)) for part in of_kind[0]}
    drawn = [(kind.share, sum(of.values())) for kind, of in zip(kinds, of_kind, strict=True)]
    excess = expected_slowest(drawn, gpus) - sum(mean.values())
    batch = config.train.micro_batch_size
    step = {part: accumulation * batch * value for part, value in mean.items()}
    computing = sum(step.values())
    meetings = accumulation if Sharding.of(config.deepspeed).stage >= 2 else accumulation**0.5
    step["waiting"] = excess * meetings * batch**0.5
    step["communication"] = _communication_seconds(config, shape, accumulation, gpus, gpu, given)
    step["optimiser"] = optimiser_seconds(config, shape, gpus, gpu, given)
    step["idle"] = given.idle * (computing + step["optimiser"])

    done = [operations(config, shape, kind) for kind in kinds]
    work = {
        part: Operations(*(sum(k.share * getattr(of[part], field) for k, of in zip(kinds, done, strict=True))
                           for field in ("forward", "backward", "recompute")))
        for part in done[0]
    }  # fmt: skip
    useful = sum(ops.forward + ops.backward for ops in work.values()) * accumulation * batch
    steps, notes = _steps(config, sequences)
    if step["geometric loss"] and config.heads.compute != "bf16":
        faster = step["geometric loss"] * gpu.fp32 / gpu.bf16
        notes += (
            f"fp32 embeddings make the loss's products IEEE fp32; heads.compute=bf16 would take them from "
            f"{step['geometric loss']:.2f} s to {faster:.2f} s of a step",
        )
    return Plan(
        gpus=gpus,
        frame_tokens=frame_tokens,
        mean_tokens=sum(kind.share * kind.tokens for kind in kinds),
        longest_tokens=longest.tokens,
        parameters=parameters(config, shape),
        memory=memory(config, shape, longest, gpus, given),
        capacity=gpu.memory,
        operations=work,
        seconds=step,
        geometry_share=(step["heads"] + step["geometric loss"]) / computing,
        batch_size=config.train.batch_size,
        steps=steps,
        mfu=useful / sum(step.values()) / gpu.bf16,
        notes=notes,
    )


def tokens_at_rate(
    rate: float, config: TrainConfig, shape: ModelShape, gpus: int, gpu: GPU, given: Assumptions
) -> int | None:
    """The most tokens a frame may have for `rate` sequences a second on each GPU; None if even one is too many."""
    low, high = 0, 4096
    while low < high:
        middle = (low + high + 1) // 2
        fast_enough = make_plan(config, shape, gpus, gpu, given, frame_tokens=middle, sequences=1).rate >= rate
        low, high = (middle, high) if fast_enough else (low, middle - 1)
    return low or None


def _communication_seconds(
    config: TrainConfig, shape: ModelShape, accumulation: int, gpus: int, gpu: GPU, given: Assumptions
) -> float:
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= 8 else min(gpu.link, gpu.network)  # of a ring through all, bound by its slowest hop
    sent = communication_bytes(config, shape, accumulation) * (gpus - 1) / gpus
    return given.exposed * sent / (speed * given.link)


def optimiser_seconds(config: TrainConfig, shape: ModelShape, gpus: int, gpu: GPU, given: Assumptions) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them: 28 bytes, and 8 more to clip."""
    count, sharding = parameters(config, shape), Sharding.of(config.deepspeed)
    trained = count["model"] + count["adapters"] + count["heads"]
    own = trained / gpus if sharding.stage >= 1 else trained
    speed = given.cpu_bandwidth if sharding.optimiser_on_cpu else gpu.bandwidth * given.optimiser
    return 36.0 * own / speed


def _steps(config: TrainConfig, sequences: int | None) -> tuple[int, tuple[str, ...]]:
    """Optimiser steps of the run, and what had to be assumed."""
    if config.train.steps is not None:
        return config.train.steps, ()
    notes: tuple[str, ...] = ()
    if sequences is None:
        sequences = _annotated(config)
    if sequences is None:
        sequences = PAPER_SEQUENCES
        notes = (f"the data is not at hand: an epoch is taken to be the paper's {sequences:,} sequences",)
    data = config.data
    sources = [source for source in (data.scenes, data.qa, data.vqa) if source.root and source.weight]
    positions = sequences * sum(source.weight for source in sources) / sources[0].weight
    return max(1, int(config.train.epochs * positions) // config.train.batch_size), notes


def _annotated(config: TrainConfig) -> int | None:
    """Sequences of an epoch, by the annotations, if they are here."""
    from gasp_fast.data.annotations.cache import PLAN_FILE, AnnotationCache

    if config.data.scenes.root and config.data.scenes.annotations:
        folder = Path(config.data.scenes.annotations[0])
        if (folder / PLAN_FILE).is_file():
            return len(AnnotationCache(folder).plan.sampler)
    return None
