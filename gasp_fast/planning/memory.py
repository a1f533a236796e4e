"""Memory of a GPU in training: weights, gradients, optimiser states, saved activations, and the working set on top.

Whatever is trained is fp32: 4 bytes of weight, 4 of gradient, 8 of AdamW's moments, 4 more of DeepSpeed's own copy, and
2 of the bf16 copy that products use (not of heads). ZeRO divides states from stage 1, gradients from stage 2, weights
in stage 3.
"""

from __future__ import annotations

from dataclasses import replace

from gasp_fast.supervision.geometric import GROUP_BYTES

from .assumptions import Assumptions
from .shapes import PATCHES
from .training_setup import SequenceSize, TrainingSetup

GATHERED = 1e9  # parameters that ZeRO-3 holds gathered at once, at most


def state_bytes(setup: TrainingSetup, gpus: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser states on each GPU."""
    count, sharding, element = setup.parameters, setup.sharding, setup.element_bytes
    trained = count.trained

    def divided(bytes_: float, from_stage: int) -> float:
        return bytes_ / gpus if sharding.stage >= from_stage else bytes_

    on_gpu = 0.0 if sharding.weights_on_cpu else 1.0
    gathered = min(GATHERED, count.frozen + trained) * element if sharding.stage == 3 else 0.0
    autocast = 2 * (count.model + count.adapters) if element == 2 else 0
    gradients_on_cpu = sharding.optimiser_on_cpu and sharding.stage >= 2
    states = divided((12 if sharding.deepspeed else 8) * trained, 1)
    return {
        "frozen weights": on_gpu * divided(element * count.frozen, 3),
        "trained weights": on_gpu * divided(4.0 * trained, 3) + autocast,
        "gathered weights": gathered,
        "gradients": 0.0 if gradients_on_cpu else divided(4.0 * trained, 2),
        "optimiser": 0.0 if sharding.optimiser_on_cpu else states,
    }


def memory_by_purpose(
    setup: TrainingSetup, longest: SequenceSize, gpus: int, assumptions: Assumptions
) -> dict[str, float]:
    """Bytes on each GPU at the peak of a step of the longest sequences."""
    batch = setup.at_once(longest)
    saved, at_work = _decoder_bytes(setup, round(batch * longest.tokens))
    vision_saved, vision_at_work = _vision_bytes(setup, round(batch * longest.visual))
    heads_kept, heads_at_work = _head_bytes(setup, round(batch * longest.tracked))
    logits = batch * assumptions.labelled * setup.shape.vocabulary * 12.0
    memory = state_bytes(setup, gpus) | {
        "saved activations": saved + vision_saved,
        "kept by heads": heads_kept,
        "working set": max(at_work, heads_at_work, logits, vision_at_work),
    }
    memory["fragmentation"] = assumptions.fragmentation * sum(memory.values())
    memory["reserve"] = assumptions.reserve
    return memory


def most_kept_layers(
    setup: TrainingSetup, longest: SequenceSize, gpus: int, memory: float, assumptions: Assumptions
) -> int:
    """The most decoder layers that can keep their activations on GPUs with this many bytes; a margin stays free."""
    for kept in range(setup.shape.layers, 0, -1):
        needed = memory_by_purpose(replace(setup, kept_layers=kept), longest, gpus, assumptions)
        if sum(needed.values()) <= (1 - assumptions.margin) * memory:
            return kept
    return 0


def activation_bytes(setup: TrainingSetup) -> float:
    """Bytes that one decoder layer saves for backward, for each token; counted from what autograd saves.

    Norms save their input in fp32, Liger's as it is; the MLP's product saves its factors, and Liger's computes
    one of them again. Adapters share their input, q, k and v with each other and o with the attention; products with
    frozen weights save none. Where weights are trained the residual stream is fp32, and every product keeps its input.
    """
    shape, element = setup.shape, setup.element_bytes
    d, ff, q, kv = shape.hidden, shape.intermediate, shape.query_width, shape.key_width
    statistics = 4 * shape.query_heads + 8
    if setup.full:
        return 16 * d + element * (5 * d + 4 * ff + 2 * q + 2 * kv) + statistics
    norms, mlp = (2 * element * d, 2 * ff) if setup.fused_layers else (8 * d, 3 * ff)
    return norms + element * (d + mlp + 2 * q + 2 * kv + 4 * (setup.adapter_rank or 0)) + statistics


def _decoder_bytes(setup: TrainingSetup, tokens: int) -> tuple[float, float]:
    """Saved by the decoder layers, and the working set of one layer. A frozen model saves nothing."""
    layer_bytes, layers = tokens * activation_bytes(setup), setup.shape.layers
    inputs = float(tokens * _residual_bytes(setup) * setup.shape.hidden * (layers - setup.kept_layers))
    if setup.heads_only:
        return 0.0, layer_bytes
    # The last layers are those that are kept. Backward has freed them when it holds a layer's activations again, and
    # their gradients; in a kept layer, only the gradients come on top.
    return layer_bytes * setup.kept_layers + inputs, (0.5 if setup.kept_layers else 1.5) * layer_bytes


def _residual_bytes(setup: TrainingSetup) -> int:
    """Bytes of one number of the residual stream."""
    return 4 if setup.full else setup.element_bytes


def _vision_bytes(setup: TrainingSetup, visual: int) -> tuple[float, float]:
    """Saved by the vision tower, and its largest working set. A frozen tower saves nothing."""
    shape, patches = setup.shape, PATCHES * visual
    block = setup.element_bytes * (8.0 * shape.vision_hidden + 4.0 * shape.vision_intermediate)
    if not setup.full:
        return 0.0, patches * block
    if not setup.checkpointing:
        return patches * 2 * block * shape.vision_layers, patches * block
    return patches * 4.0 * shape.vision_hidden * shape.vision_layers, patches * 3 * block


def _head_bytes(setup: TrainingSetup, tracked: int) -> tuple[float, float]:
    """Kept until backward (the gradients that were computed in forward), and the working set of a group of layers."""
    hidden, middle, out = setup.shape.hidden, setup.head_sizes[0], setup.compared + setup.live_sizes[0]
    inputs = 0 if setup.heads_only else setup.supervised_layers * tracked * hidden * _residual_bytes(setup)
    kept = inputs + 4.0 * setup.parameters.heads
    group = GROUP_BYTES // max(1, tracked * (hidden + out) * _residual_bytes(setup))
    layers = min(setup.supervised_layers, max(1, group))
    element = 2 if setup.head_precision == "bf16" else 4
    compared = 8.0 * out + 2.0 * setup.coordinates  # embeddings, their gradients in both types; duals
    at_work = layers * tracked * (element * (3.0 * hidden + 4.0 * middle) + compared) + (128 << 20)
    return kept, at_work if setup.supervised_layers else 0.0
