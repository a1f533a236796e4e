"""FLOPs of a training step, by part of the model. The estimate of a run and the MFU in its log both count here.

FLOPs, forward, for a sequence of S tokens, N of them visual, A of those anchors of matches (a multiplication and its
addition are two):

    decoder         2 S x weights of its matrices
    attention       2 S^2 x width x layers                          (causal: half of the square; 4 per pair)
    adapters        2 S x weights of the adapters
    vision          2 patches x weights of a block x blocks, its own attention, and the projector on N tokens
    lm head         2 x labelled tokens x hidden x vocabulary        (only labelled tokens get logits)
    heads           2 N x weights of the heads                      (of their first matrices, with coordinates)
    geometric loss  2 A N x width x supervised layers                (one product; two more are its backward)
                    2 N x width^2 x supervised layers on top, with coordinates: their duals (`loss/metric.py`);
                    micro-batches are taken to have enough tokens for these (`supervision/heads.py`)

Backward costs once the forward where weights are frozen (only the input's gradient is computed), twice where they are
trained, and in attention. A frozen vision tower has no backward. Forward and backward are the model FLOPs, and all
that MFU counts. Recomputation comes on top: attention's backward computes its scores again (half of its forward), and
under checkpointing the decoder layers that keep no activations, with their attention and adapters, and a trained vision
tower run forward once more. A layer's last product is not repeated: nothing that follows it saves anything. The rest is
not recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .shapes import PATCHES, WINDOW, ModelShape
from .training_setup import SequenceMix, SequenceSize, TrainingSetup


@dataclass(frozen=True)
class Flops:
    """Of one part of the model, for one sequence."""

    forward: float
    backward: float
    recompute: float = 0.0

    @property
    def model(self) -> float:
        """What the model needs, each product once."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """What the GPU computes."""
        return self.model + self.recompute


def flops_by_part(setup: TrainingSetup, sequence: SequenceSize) -> dict[str, Flops]:
    """FLOPs of each part of the model, for one sequence."""
    shape, tokens = setup.shape, sequence.tokens
    again = setup.recomputed
    # Backward products per forward product: of inputs and weights, of inputs alone, or none.
    weights = 2.0 if setup.full else 0.0 if setup.heads_only else 1.0
    through = not setup.heads_only  # whether gradients flow through the model

    decoder = 2.0 * tokens * shape.layer_weights * shape.layers
    attention = 2.0 * tokens**2 * shape.query_width * shape.layers
    adapters = 2.0 * tokens * setup.adapter_weights * shape.layers
    last = 2.0 * tokens * shape.hidden * shape.intermediate * shape.layers  # the MLP's down projection
    tower = vision_forward(shape, sequence)
    vision = tower.mlp + tower.other + tower.attention
    # A frozen tower of which checkpointing asks a gradient computes one, for nothing.
    needless = 2 * vision if setup.checkpointing and not setup.design.frozen_tower else 0.0
    lm_head = 2.0 * sequence.labelled * shape.hidden * shape.vocabulary
    live, compared = setup.live_sizes
    heads = 2.0 * sequence.tracked * (setup.head_products + shape.hidden * live) * setup.supervised_layers
    head_inputs = 2.0 * sequence.tracked * shape.hidden * setup.head_sizes[0] * setup.supervised_layers
    loss = 2.0 * sequence.anchors * sequence.tracked * (setup.compared + compared) * setup.supervised_layers
    loss += 2.0 * sequence.tracked * setup.coordinates**2 * setup.supervised_layers
    return {
        "decoder": Flops(decoder, weights * decoder, again * (decoder - last)),
        "attention": Flops(attention, 2 * attention * through, (0.5 * through + again) * attention),
        "adapters": Flops(adapters, 2 * adapters, again * adapters),
        "vision": Flops(vision, 2 * vision, vision * setup.checkpointing)
        if setup.full
        else Flops(vision, 0.0, needless),
        "lm head": Flops(lm_head, weights * lm_head),
        "heads": Flops(heads, 2 * heads - (0.0 if through else head_inputs)),
        "geometric loss": Flops(loss, 2 * loss),
    }


def model_flops(setup: TrainingSetup, sequences: Iterable[SequenceSize]) -> float:
    """FLOPs that the model needs for a forward and backward pass over `sequences`: what MFU counts."""
    return sum(part.model for sequence in sequences for part in flops_by_part(setup, sequence).values())


def mean_flops(setup: TrainingSetup, mix: SequenceMix) -> dict[str, Flops]:
    """FLOPs of each part of the model, for the mean sequence of a mix."""
    mean: dict[str, Flops] = {}
    for share, size in mix:
        for part, flops in flops_by_part(setup, size).items():
            before = mean.get(part, Flops(0.0, 0.0))
            mean[part] = Flops(
                before.forward + share * flops.forward,
                before.backward + share * flops.backward,
                before.recompute + share * flops.recompute,
            )
    return mean


@dataclass(frozen=True)
class VisionFlops:
    """Forward, of the vision tower and its projector."""

    mlp: float
    attention: float
    other: float  # projections


def vision_forward(shape: ModelShape, sequence: SequenceSize) -> VisionFlops:
    """FLOPs of the vision tower for the frames of one sequence."""
    patches = PATCHES * sequence.visual
    blocks = shape.vision_block_weights * shape.vision_layers
    mlp = blocks - 4 * shape.vision_hidden**2 * shape.vision_layers
    frame_patches = patches // max(1, sequence.frames)
    windowed = shape.vision_layers - shape.vision_full_layers
    keys = shape.vision_full_layers * frame_patches + windowed * min(WINDOW, frame_patches)  # summed over layers
    rest = shape.vision_parameters - blocks  # the projector, nearly all of it
    return VisionFlops(
        mlp=2.0 * patches * mlp,
        attention=4.0 * patches * keys * shape.vision_hidden,
        other=2.0 * patches * (blocks - mlp) + 2.0 * sequence.visual * rest,
    )
