"""FLOPs of a pack, and an estimate of memory and time of a run of G²VLM.

Parameters and products are counted. Activations are counted for the default checkpointing of layers (their inputs, and
one layer that is being recomputed). Efficiencies are those of `gasp_fast.planning.assumptions`: nothing of G²VLM has
been measured on a GPU. Of GASP's supervision only the parameters are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.flops import Flops
from gasp_fast.planning.gpus import GPU
from gasp_fast.planning.plan import Totals
from gasp_fast.planning.training_setup import Sharding
from gasp_fast.supervision.heads import CorrespondenceHead, parse_layers
from gasp_fast.supervision.heads import HeadsConfig as CorrespondenceConfig

from .batch import PATCH, GeometryBatch
from .config import G2TrainConfig
from .data_config import frame_size
from .heads import GeometryHeads, HeadsConfig
from .model import G2VLM, IGNORED
from .shapes import Shapes
from .tokens import Arrangement

PIXEL_BYTES = 160  # of a pixel of a frame: two predicted points, their true ones, weights and gradients, float32
HEAD_STATES = 20  # tensors of the decoder's width that a block of the heads keeps: norms, attention, an MLP of 4 widths
PASSES = 24  # over a token's residual stream in a layer, forward and backward, between products; float32


def pack_flops(
    config: G2TrainConfig, shapes: Shapes, sequences: int, arrangement: Arrangement, labelled: int = 0
) -> dict[str, Flops]:
    """Of a forward and backward pass over sequences of one shape, by part, without the vision tower of questions."""
    once = {name: sequences * flops for name, flops in shapes.forward_flops(arrangement).items()}
    mode, experts = config.train.mode, config.experts
    recomputed = sum(experts.recomputes(layer, shapes.layers) for layer in range(shapes.layers)) / shapes.layers

    def of(name: str, inputs: bool, weights: bool) -> Flops:
        """A product whose inputs, or whose weights, have a gradient."""
        return Flops(once[name], once[name] * (inputs + weights), recomputed * once[name])

    parts = {
        "encoder": Flops(once["encoder"], 0.0),
        "linear map": Flops(once["patch_map"], once["patch_map"] * (mode != "semantic")),
        # Gradients reach both kinds of tokens, whichever expert learns: attention is joint.
        "geometric expert": of("geometric", True, mode != "semantic"),
        "semantic expert": of("semantic", True, mode != "geometric"),
        "attention": of("attention", True, True),
    }
    if config.loss.geometry_weight:
        heads = 2.0 * head_products(config.heads) * sequences * arrangement.patches
        parts["heads"] = Flops(heads, 2 * heads, heads if config.heads.checkpointing else 0.0)
    if labelled:
        logits = 2.0 * shapes.width * shapes.vocabulary * labelled
        parts["lm head"] = Flops(logits, 2 * logits)
    return parts


def step_flops(config: G2TrainConfig, model: G2VLM, pack: GeometryBatch) -> float:
    """Model FLOPs of a pack: nothing counts twice because it is recomputed."""
    batch, frames, _, height, width = pack.images.shape
    tail = 0 if pack.questions is None else pack.questions.input_ids.shape[1]
    labelled = 0 if pack.questions is None else int((pack.questions.labels[:, 1:] != IGNORED).sum())
    arrangement = Arrangement(frames, height // PATCH, width // PATCH, tail=tail)
    parts = pack_flops(config, Shapes.of(model), batch, arrangement, labelled).values()
    return sum(part.model for part in parts)


@cache
def head_products(config: HeadsConfig) -> int:
    """Weights of the heads that are multiplied with every patch; those of pixels and cameras count as such."""
    with torch.device("meta"):
        heads = GeometryHeads(config)
    return sum(parameter.numel() for parameter in heads.parameters() if parameter.dim() == 2)


@dataclass(frozen=True)
class G2Plan(Totals):
    """The estimate of a run."""

    gpus: int
    gpu: GPU
    sequences: int  # of a pack
    arrangement: Arrangement  # of its sequences, the longest that are drawn
    parameters: dict[str, int]
    memory: dict[str, float]  # bytes of a GPU by purpose
    flops: dict[str, Flops]  # of a pack
    seconds: dict[str, float]  # of a step on each GPU
    steps: int

    @property
    def gpu_hours(self) -> float:
        return self.steps * self.step_seconds * self.gpus / 3600


def plan_run(config: G2TrainConfig, shapes: Shapes, gpus: int, gpu: GPU, sharding: Sharding, tail: int = 0) -> G2Plan:
    """Of the largest step that a run draws. `tail`: tokens of a question and its pictures in the joint stage."""
    assumptions, train = Assumptions(), config.train
    height, width = frame_size(config.data.side, 1.0)
    arrangement = Arrangement(config.data.max_frames, height // PATCH, width // PATCH, tail=tail)
    per_gpu = -(-train.batch_size // gpus)
    sequences = min(per_gpu, max(1, train.tokens_at_once // arrangement.patches))
    flops = pack_flops(config, shapes, sequences, arrangement, assumptions.labelled * sequences if tail else 0)
    trained, frozen = parameter_counts(config, shapes)
    memory = _memory(
        config, shapes, sharding, gpus, sequences * arrangement.total, sum(trained.values()), sum(frozen.values())
    )
    packs = per_gpu / sequences
    seconds = {name: packs * _seconds(name, part, config, gpu, assumptions) for name, part in flops.items()}
    passes = 4.0 * shapes.width * shapes.layers * PASSES * packs * sequences * arrangement.total
    seconds["norms, activations"] = passes / (assumptions.bandwidth * gpu.bandwidth)
    weights = sum(trained.values()) / (gpus if sharding.stage else 1)
    seconds["optimiser"] = 28.0 * weights / (assumptions.optimiser * gpu.bandwidth)  # 7 numbers of 4 bytes are moved
    if gpus > 1:
        moved = 8.0 * sum(trained.values()) * (gpus - 1) / gpus
        seconds["communication"] = (
            assumptions.exposed * moved / (assumptions.link * (gpu.link if gpus <= 8 else gpu.network))
        )
    parameters = {**trained, **{f"{name} (frozen)": count for name, count in frozen.items()}}
    return G2Plan(gpus, gpu, sequences, arrangement, parameters, memory, flops, seconds, train.steps)


def parameter_counts(config: G2TrainConfig, shapes: Shapes) -> tuple[dict[str, int], dict[str, int]]:
    """By part: those that are trained, and those that are frozen."""
    with torch.device("meta"):
        heads = sum(parameter.numel() for parameter in GeometryHeads(config.heads).parameters())
    counts = {**shapes.parameters(), "heads": heads}
    if config.gasp.weight:
        counts["gasp"] = _gasp_parameters(config.gasp.heads, shapes)
    geometric, semantic = ("geometric", "patch_map", "heads"), ("semantic", "embedding", "lm_head")
    learning = {"geometric": geometric, "semantic": semantic, "both": (*geometric, *semantic)}[config.train.mode]
    trained = {name: count for name, count in counts.items() if name in (*learning, "gasp")}
    return trained, {name: count for name, count in counts.items() if name not in trained}


def _gasp_parameters(config: CorrespondenceConfig, shapes: Shapes) -> int:
    """Of the correspondence heads of the semantic expert's layers."""
    queries = shapes.heads * shapes.head_dim
    with torch.device("meta"):
        head = CorrespondenceHead(shapes.width, config.mid_size, config.out_size or queries)
    layers = len(parse_layers(config.layers, shapes.layers))
    return layers * sum(parameter.numel() for parameter in head.parameters())


def _memory(
    config: G2TrainConfig, shapes: Shapes, sharding: Sharding, gpus: int, tokens: int, trained: int, frozen: int
) -> dict[str, float]:
    """Bytes of a GPU by purpose, for a pack of so many tokens."""
    assumptions, heads = Assumptions(), config.heads
    kept = sum(not config.experts.recomputes(layer, shapes.layers) for layer in range(shapes.layers))
    layer = tokens * (2.0 * (6 * shapes.width + 3 * shapes.mlp) + 16.0 * shapes.width)  # bf16 products, fp32 streams
    states = 4.0 * tokens * heads.width
    blocks = 3 * heads.layers
    memory = {
        "weights": 4.0 * (trained + frozen),
        "gradients": 4.0 * trained / (gpus if sharding.stage >= 2 else 1),
        "optimiser": 8.0 * trained / (gpus if sharding.stage >= 1 else 1),
        "inputs of layers": 4.0 * tokens * shapes.width * (shapes.layers - kept),
        "activations of layers": layer * (kept + (kept < shapes.layers)),
        "activations of heads": states * (blocks + HEAD_STATES if heads.checkpointing else blocks * HEAD_STATES),
        "points": float(PIXEL_BYTES * PATCH**2 * tokens),
    }
    if not config.loss.geometry_weight:
        del memory["activations of heads"], memory["points"]
    memory["fragments, reserve"] = assumptions.fragmentation * sum(memory.values()) + assumptions.reserve
    return memory


def _seconds(name: str, part: Flops, config: G2TrainConfig, gpu: GPU, assumptions: Assumptions) -> float:
    """Of a pack."""
    if name == "heads":
        peak = {"fp32": gpu.fp32, "tf32": gpu.tf32, "bf16": gpu.bf16}[config.heads.compute]
        return part.total / (assumptions.heads * peak)
    share = assumptions.attention if name == "attention" else assumptions.products
    return part.total / (share * gpu.bf16)


def shapes_of(config: G2TrainConfig) -> tuple[Shapes, bool]:
    """The shapes of the run's models, and whether they were read: models of the hub are taken to be the paper's."""
    sources = (config.model.source, config.model.encoder)
    if not all(Path(source).is_dir() for source in sources):
        return Shapes(qk_norm=config.experts.qk_norm, attention=config.experts.attention), False
    from transformers import AutoConfig

    qwen, dino = (AutoConfig.from_pretrained(source, trust_remote_code=False) for source in sources)
    return Shapes.of_configurations(qwen, dino, config.experts), True
