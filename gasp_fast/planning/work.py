"""What a GPU does in a forward and backward pass: FLOPs of products, and bytes of everything else.

A table of `Work`, by part of the step. A kernel takes its FLOPs / (peak x efficiency) or its bytes / (bandwidth x
efficiency); products with few FLOPs a byte take both. FLOPs are those of `flops.py`.

Bytes are counted from the operations of the modules, for bf16 numbers: a kernel reads its inputs and writes its result,
so a sum of two takes 6 bytes a number. Numbers here are bytes for each number of a token's vector, forward and
backward:

    an RMS norm      36, 64   eight kernels, most of them on fp32 copies;  4, 6 fused
    rotary           20, 20   of queries and keys;                         8, 8 fused
    silu(gate) x up  10, 18   of the MLP's width;                          6, 10 fused
    residual sums     6,  6   two a layer
    attention         4,  4   its result is copied into the layout of the next product
    adapters         10,  4   the result is scaled and added; gradients of their inputs are summed in backward

The host gives a GPU one operation after another. Where that takes longer than the operations, the GPU waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from .flops import flops_by_part, vision_forward
from .shapes import PATCHES
from .training_setup import SequenceSize, TrainingSetup

ALIGNED = 8  # products of a width that is no multiple of this cannot load 16 bytes at once
BACKWARD = 1.5  # kernels of a vision tower that are no products: backward over forward
CAST = 6  # bytes: read 2 and write 4, or the reverse


@dataclass(frozen=True)
class Work:
    """Of one part of a step."""

    part: str
    flops: float = 0.0
    rate: str = "products"  # the field of `Assumptions` with its efficiency
    bytes: float = 0.0
    speed: str = "bandwidth"  # likewise
    seconds: float = 0.0  # that depend on nothing


def work_of_sequence(setup: TrainingSetup, sequence: SequenceSize) -> list[Work]:
    """A forward and backward pass over one sequence."""
    flops = {part: of.total for part, of in flops_by_part(setup, sequence).items()}
    layers, tokens = setup.shape.layers, sequence.tokens
    passes = 1 + setup.recomputed  # forward
    forward, backward = _between_products(setup)
    loss_rate = "loss" if setup.embedding_precision == "bf16" else "loss_fp32"
    rows = float(sequence.tracked) * setup.supervised_layers
    similarities = sequence.anchors * rows * setup.comparisons
    return [
        Work("decoder", flops["decoder"]),
        Work("attention", flops["attention"], "attention"),
        Work("adapters", flops["adapters"], "products", layers * tokens * _adapter_bytes(setup), "operands"),
        *_vision(setup, sequence),
        Work("lm head", flops["lm head"]),
        Work("heads", flops["heads"], "heads"),
        Work("geometric loss", flops["geometric loss"], loss_rate, similarities * _loss_bytes(setup), "operands"),
        # Its rows are gathered; their gradients, if any, are written between zeros and added to the layer's.
        Work("geometric loss", bytes=(4 if setup.heads_only else 16) * rows * setup.shape.hidden, speed="operands"),
        Work("geometric loss", seconds=_loss_seconds(setup) if sequence.tracked else 0.0),
        Work("norms, activations", bytes=layers * tokens * (passes * forward + backward)),
    ]


def work_of_micro_batch(setup: TrainingSetup) -> list[Work]:
    """What comes once in a micro-batch, however many sequences it holds."""
    casts = 2 * CAST + 12.0  # the gradient of an adapter is cast to fp32 and added
    if not setup.design.cast_once:
        casts += CAST * (1 + setup.recomputed)
    metrics = 6.0 * setup.head_sizes[1] * setup.coordinates**2 * setup.supervised_layers  # W^T W, and its backward
    return [
        Work("adapters", bytes=casts * setup.parameters.adapters, speed="operands"),
        Work("heads", metrics, "heads"),
    ]


def operations(setup: TrainingSetup) -> float:
    """That the host starts in a micro-batch, counted by torch's profiler on small Qwen2.5-VL and LLaVA-NeXT-Video.

    Two are estimates: what Liger's layers save, and the loss, whose launches take as long as several operations.
    """
    shape, design = setup.shape, setup.design
    forward, backward = (76, 138) if design.cast_once else (90, 147)  # of a decoder layer
    if setup.fused_layers:
        forward, backward = forward - 26, backward - 45
    if setup.heads_only:
        backward = 0
    tower = 26  # of a vision layer
    if tower_is_differentiated(setup):
        tower = 295 if shape.vision_gated else 81
    elif shape.vision_gated:
        tower = 53 if design.fused_tower else 77
    decoder = shape.layers * (forward * (1 + setup.recomputed) + backward)
    return decoder + shape.vision_layers * tower + setup.supervised_layers * 140 + 250


def tower_is_differentiated(setup: TrainingSetup) -> bool:
    """Whether the vision tower has a backward pass: where it is trained, or where checkpointing mistook it for that."""
    return setup.full or (setup.checkpointing and not setup.design.frozen_tower)


def _between_products(setup: TrainingSetup) -> tuple[float, float]:
    """Bytes of one token in one decoder layer, forward and backward."""
    shape, adapted = setup.shape, setup.adapter_rank is not None
    d, q, outputs = shape.hidden, shape.query_width, _adapter_outputs(setup)
    norm, rotary, mlp = ((4, 6), (8, 8), (6, 10)) if setup.fused_layers else ((36, 64), (20, 20), (10, 18))
    rotated = q + shape.key_width
    forward, backward = (
        2 * norm[way] * d + rotary[way] * rotated + mlp[way] * shape.intermediate + 12 * d + 4 * q for way in (0, 1)
    )
    forward += 10 * outputs * adapted
    backward += (4 * outputs + 30 * d + 6 * q) if adapted else 12 * d
    if adapted and not setup.design.cast_once:  # inputs of adapters: to fp32, and their gradients back
        forward += CAST * _adapter_inputs(setup)
        backward += CAST * _adapter_inputs(setup)
    scale = setup.element_bytes / 2
    return scale * forward, 0.0 if setup.heads_only else scale * backward


def _adapter_bytes(setup: TrainingSetup) -> float:
    """Bytes of one token in the products of one layer's adapters, the casts of their inputs included."""
    if setup.adapter_rank is None:
        return 0.0
    inputs, passes = _adapter_inputs(setup), 1 + setup.recomputed
    each = 2.0 * (inputs + _adapter_outputs(setup) + 8 * setup.adapter_rank)  # A and B read and write
    casts = 0.0 if setup.design.cast_once else CAST * inputs
    return (passes + 2) * each + (passes + 1) * casts  # two products in backward


def _adapter_inputs(setup: TrainingSetup) -> int:
    return 3 * setup.shape.hidden + setup.shape.query_width  # of q, k, v and o


def _adapter_outputs(setup: TrainingSetup) -> int:
    return setup.shape.query_width + 2 * setup.shape.key_width + setup.shape.hidden


def _vision(setup: TrainingSetup, sequence: SequenceSize) -> list[Work]:
    shape, design = setup.shape, setup.design
    flops = vision_forward(shape, sequence)
    again = tower_is_differentiated(setup)
    weights = 2.0 if setup.full else 1.0
    recomputed = float(setup.checkpointing and again)
    products, attention = (1 + recomputed + again * weights, 1 + recomputed + 2.5 * again)
    slow = shape.vision_intermediate % ALIGNED and not design.padded_tower
    d, ff = shape.vision_hidden, shape.vision_intermediate
    if not shape.vision_gated:  # CLIP, for which others are taken: layer norms with fp32 copies, quick GELU
        bytes_ = 76 * d + 14 * ff
    elif design.fused_tower:  # in place only where nothing is kept for backward
        bytes_ = 124 * d + 10 * ff if again else 36 * d + 6 * ff  # two norms 8, rotary 96 or 8, copies 8, sums 12
    else:
        bytes_ = 212 * d + 10 * ff  # two norms 72, rotary in fp32 104, copies 24, sums 12
    passes = 1 + recomputed + BACKWARD * again
    traffic = passes * PATCHES * sequence.visual * shape.vision_layers * bytes_ * setup.element_bytes / 2
    return [
        Work("vision", products * flops.mlp, "unaligned" if slow else "products"),
        Work("vision", products * flops.other, "products", traffic, "vision"),
        Work("vision", attention * flops.attention, "attention"),
    ]


def _loss_bytes(setup: TrainingSetup) -> float:
    """Of a similarity in the row passes of the loss.

    Fitted to what W1, W2 and W3 in h200-2026-11-26-blocks take beyond three bare products, and to step-b.json.
    """
    return 26.0 if setup.design.loss_blocks else 76.0


def _loss_seconds(setup: TrainingSetup) -> float:
    """Of the loss of a sequence, whatever its size. From the same files."""
    return setup.supervised_layers * (0.09e-3 if setup.design.loss_blocks else 0.88e-3)
