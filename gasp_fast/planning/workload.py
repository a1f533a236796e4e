"""What a recipe makes a GPU do: the sequences it draws, its parameters, and the operations of each part of the model.

Knows a configuration and a model's shape; must not know how fast or how large any GPU is (`cost_model.py` does).
Operations are counted here and nowhere else: the plan of a run and the MFU in its log come from the same numbers.

Operations, forward, for a sequence of S tokens, N of them visual, A of those anchors of matches (a multiplication and
its addition are two):

    decoder         2 S x weights of its matrices
    attention       2 S^2 x width x layers                          (causal: half of the square; 4 per pair)
    adapters        2 S x weights of the adapters
    vision          2 patches x weights of a block x blocks, its own attention, and the projector on N tokens
    lm head         2 x labelled tokens x hidden x vocabulary        (only labelled tokens get logits)
    heads           2 N x weights of the heads
    geometric loss  2 A N x width x supervised layers                (one product; two more are its backward)

Backward costs once the forward where weights are frozen (only the input's gradient is wanted), twice where they are
trained, and in attention. A frozen vision tower has no backward. Forward and backward are what the model needs, and all
that MFU counts. Recomputation comes on top: attention's backward computes its scores again (half of its forward), and
under checkpointing decoder, attention and adapters run forward once more; heads and loss never do.
"""

from __future__ import annotations

from dataclasses import dataclass

from gasp_fast.supervision.heads import parse_layers
from gasp_fast.training.config import TrainConfig

from .shapes import PATCHES, WINDOW, ModelShape

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is neither counted nor stated. None of it has been measured on a GPU yet; `calibration.py` replaces it."""

    decoder: float = 0.60  # of the peak, in the decoder's products
    attention: float = 0.45
    adapters: float = 0.60
    vision: float = 0.35  # small matrices, attention in windows
    heads: float = 0.50
    loss: float = 0.50
    bandwidth: float = 0.70  # of the stated one, in norms, activations, rotations
    optimiser: float = 0.70  # of the stated bandwidth
    idle: float = 0.0  # of the computing time, on top: a GPU that waits for its host
    link: float = 0.70  # of the stated one
    exposed: float = 0.30  # share of communication that hides behind nothing
    visible: float = 0.6  # of all (track, frame) pairs
    prompt_tokens: int = 64  # text of a sequence of a scene
    qa_tokens: int = 256  # text of questions and answers
    labelled: int = 128  # of those
    cpu_bandwidth: float = 40e9  # bytes, of the host's memory, for each GPU; where the optimiser is offloaded
    reserve: float = 3 * GIB  # context, communication buffers, kernels
    fragmentation: float = 0.05  # of everything else
    source_frame: tuple[int, int] = (960, 540)  # of the scenes, where nothing else limits a frame


# ---- what is trained on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One kind of sequence, and how often it comes; or one that came."""

    share: float = 1.0
    frames: int
    tokens: int  # S
    visual: int  # N
    tracked: int  # N again, or 0 without tracks
    anchors: int  # A
    labelled: int


def sequences_of(config: TrainConfig, frame_tokens: int, given: Assumptions) -> list[Sequence]:
    """The kinds of sequences that a run draws: one for each number of frames, and one for each source of questions."""
    data, drawn = config.data, config.data.scenes.sequences
    sources = [
        (data.scenes.root, data.scenes.weight, True, list(range(drawn.min_frames, drawn.max_frames + 1))),
        (data.qa.root, data.qa.weight, False, [data.qa.frames]),
        (data.vqa.root, data.vqa.weight, False, [data.vqa.frames]),
    ]
    total = sum(weight for root, weight, _, _ in sources if root)
    found = []
    for root, weight, tracked, counts in sources:
        if not root or not weight:
            continue
        for frames in counts:
            visual = frames * frame_tokens
            supervised = tracked and config.loss.geometric
            found.append(
                Sequence(
                    share=weight / total / len(counts),
                    frames=frames,
                    tokens=visual + (given.prompt_tokens if tracked else given.qa_tokens),
                    visual=visual,
                    tracked=visual if supervised else 0,
                    anchors=_anchors(config, frames, visual, given) if supervised else 0,
                    labelled=0 if tracked else given.labelled,
                )
            )
    return found


def _anchors(config: TrainConfig, frames: int, visual: int, given: Assumptions) -> int:
    """Unique anchor tokens of a sequence: no more than there are points, and no more than there are tokens."""
    tracks = sum(round(config.data.scenes.keep * grid * grid) for grid in config.data.scenes.grids)
    per_frame = min(tracks, visual // frames)
    if config.data.collator.anchors == "first":
        return per_frame
    return min(visual, round(per_frame * frames * given.visible))


def frame_tokens_of(config: TrainConfig, shape: ModelShape, given: Assumptions) -> int:
    if shape.frame_tokens is not None:
        return shape.frame_tokens
    width, height = given.source_frame
    pixels = min(config.model.frame_pixels or width * height, width * height)
    return max(1, pixels // (PATCHES * shape.patch**2))


# ---- operations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operations:
    """Of one part of the model, for one sequence."""

    forward: float
    backward: float
    recompute: float = 0.0

    @property
    def needed(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.needed + self.recompute


def operations(config: TrainConfig, shape: ModelShape, sequence: Sequence) -> dict[str, Operations]:
    """Of each part, for one sequence."""
    tokens, full = sequence.tokens, config.train.mode == "full"
    again = 0.0 if config.train.checkpointing == "off" else 1.0
    weights = 2.0 if full else 1.0  # backward products per forward product

    decoder = 2.0 * tokens * shape.layer_weights * shape.layers
    attention = 2.0 * tokens**2 * shape.query_width * shape.layers
    adapters = 0.0 if full else 2.0 * tokens * shape.adapter_weights(config.lora.rank) * shape.layers
    vision = _vision_operations(shape, sequence)
    lm_head = 2.0 * sequence.labelled * shape.hidden * shape.vocabulary
    layers = len(supervised_layers(config, shape))
    middle, width = head_sizes(config, shape)
    heads = 2.0 * sequence.tracked * middle * (shape.hidden + width) * layers
    loss = 2.0 * sequence.anchors * sequence.tracked * width * layers
    return {
        "decoder": Operations(decoder, weights * decoder, again * decoder),
        "attention": Operations(attention, 2 * attention, (0.5 + again) * attention),
        "adapters": Operations(adapters, 2 * adapters, again * adapters),
        "vision": Operations(vision, 2 * vision if full else 0.0, again * vision if full else 0.0),
        "lm head": Operations(lm_head, weights * lm_head),
        "heads": Operations(heads, 2 * heads),
        "geometric loss": Operations(loss, 2 * loss),
    }


def _vision_operations(shape: ModelShape, sequence: Sequence) -> float:
    patches = PATCHES * sequence.visual
    blocks = shape.vision_block_weights * shape.vision_layers
    of_frame = patches // max(1, sequence.frames)
    windowed = shape.vision_layers - shape.vision_full_layers
    keys = shape.vision_full_layers * of_frame + windowed * min(WINDOW, of_frame)  # summed over layers
    rest = shape.vision_parameters - blocks  # the projector, nearly all of it
    return 2.0 * patches * blocks + 4.0 * patches * keys * shape.vision_hidden + 2.0 * sequence.visual * rest


def supervised_layers(config: TrainConfig, shape: ModelShape) -> list[int]:
    return parse_layers(config.heads.layers, shape.layers) if config.loss.geometric else []


def head_sizes(config: TrainConfig, shape: ModelShape) -> tuple[int, int]:
    """Middle and output of a head."""
    out = config.heads.out_size or (shape.query_width if config.heads.init == "svd" else shape.hidden)
    return config.heads.mid_size or shape.hidden // 2, out


def head_parameters(config: TrainConfig, shape: ModelShape) -> int:
    middle, out = head_sizes(config, shape)
    return len(supervised_layers(config, shape)) * (middle * (shape.hidden + out) + middle + out)


def parameters(config: TrainConfig, shape: ModelShape) -> dict[str, int]:
    """Frozen and trained parameters by kind."""
    base = shape.language_parameters + shape.vision_parameters
    full = config.train.mode == "full"
    return {
        "frozen": 0 if full else base,
        "model": base if full else 0,
        "adapters": 0 if full else shape.adapter_weights(config.lora.rank) * shape.layers,
        "heads": head_parameters(config, shape),
    }
