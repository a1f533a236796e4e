"""GASP's supervision of the semantic expert: ViT tokens of different frames that see one point become alike.

The visual tokens are those of the frames' images in the tail, behind the geometry. Matches, heads, and loss are GASP's
own; `SemanticExpert` describes to them where the parts of this model are.

    supervision = build_gasp(model, config, device)  # None where config.weight is 0
    with gasp_capture(supervision, model) as capture:
        output = model(pack.images, pack.questions)
    if supervision is not None:
        terms = gasp_terms(supervision, capture, model, pack)
        loss = loss + config.weight * terms["loss"]

The capture must end before the backward pass, in which layers may run again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gasp_fast.attachment.build import ModelDtype, build_heads, build_supervision
from gasp_fast.backbones import Backbone
from gasp_fast.backbones.frames import RGBImage
from gasp_fast.backbones.qwen2_vl import Qwen2VL
from gasp_fast.collator import Collator, Sample, no_matches
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import LARGEST_GRID, build_tracks
from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.heads import HeadsConfig
from gasp_fast.supervision.layer_capture import LayerCapture

from .batch import GeometryBatch
from .model import G2VLM


@dataclass(frozen=True, kw_only=True)
class G2GaspConfig:
    """GASP's supervision of the semantic expert. Needs questions, whose images it supervises."""

    weight: float = 0.0  # of its loss, beside the others; 0: off
    grids: tuple[int, ...] = (8, 24)  # tracked points along a side of the first frame, coarse and fine
    keep: float = 0.5  # share of the tracks to keep
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"gasp.weight = {self.weight} must be finite and 0 or more")
        if not self.grids or not all(1 <= grid <= LARGEST_GRID for grid in self.grids):
            raise ValueError(f"gasp.grids = {list(self.grids)} must be points along a side, 1 to {LARGEST_GRID}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"gasp.keep = {self.keep} is a share of the tracks; give 0 < keep <= 1")
        if self.heads.live is not None:
            raise ValueError(
                f"gasp.heads.kind = {self.heads.kind} supervises projections of the model itself, which are one matrix "
                "here; use correspondence"
            )
        if self.weight and not self.loss.geometric:
            raise ValueError("gasp.loss.corr_weight and gasp.loss.depth_weight are both 0; set gasp.weight=0 instead")


class SemanticExpert(Qwen2VL):
    """Where GASP finds the parts of the semantic expert."""

    def __init__(self, model: G2VLM) -> None:
        super().__init__(model.qwen_config.name_or_path, model.qwen_config, None)

    def decoder_layers(self, model: Any) -> nn.ModuleList:
        return model.experts.layers

    def final_norm(self, model: Any) -> nn.Module:
        return model.experts.semantic_norm

    def query_projection(self, model: Any, layer: int) -> tuple[Tensor, Tensor | None]:
        expert = model.experts.layers[layer].semantic
        queries = expert.qkv_rows[0]
        return expert.qkv.weight[:queries], expert.qkv.bias[:queries]


def build_gasp(model: G2VLM, config: G2GaspConfig, device: torch.device) -> GeometricSupervision | None:
    """Heads of the semantic expert's layers with their loss, on the CPU; None where `config.weight` is 0.

    `device` is that of the training, which decides what "auto" precision is, and starts the heads. Their parameters
    are not the model's: add them to the optimiser.
    """
    if not config.weight:
        return None
    expert = SemanticExpert(model)
    dtype: ModelDtype = "bf16" if device.type == "cuda" else "fp32"
    heads = build_heads(config.heads, expert, model, device, dtype)
    return build_supervision(config.heads, config.loss, expert, model, heads, dtype)


def gasp_capture(supervision: GeometricSupervision | None, model: G2VLM) -> LayerCapture:
    """Keeps what the heads read of a forward pass in its context: the semantic tokens, of which the tail is the end."""
    layers: Any = model.experts.layers
    if supervision is None:
        return LayerCapture(layers, model.experts.semantic_norm, [])
    return supervision.capture(layers, model.experts.semantic_norm)


def gasp_terms(
    supervision: GeometricSupervision, capture: LayerCapture, model: G2VLM, pack: GeometryBatch
) -> dict[str, Tensor]:
    """`loss`, the mean over layers; and `corr`, `depth`, `pck`, `cosine` of each layer [L], without gradient."""
    matches = no_matches().to(pack.images.device) if pack.matches is None else pack.matches
    positions = torch.zeros(0, dtype=torch.long, device=matches.device)
    if pack.questions is not None and pack.matches is not None:
        states = capture.hidden(supervision.layers[0])
        is_image = pack.questions.input_ids == model.qwen_config.image_token_id  # [B, S]
        before = states.shape[1] - is_image.shape[1]  # starts, ends and prefix
        positions = nn.functional.pad(is_image, (before, 0)).flatten().nonzero()[:, 0]
    if len(positions) != matches.tokens:
        raise ValueError(
            f"pack.matches are over {matches.tokens} tokens, and pack.questions has {len(positions)} of images; both "
            "must be of the same frames, sequence by sequence"
        )
    return supervision(capture, positions, matches)


def sequence_matches(
    backbone: Backbone, config: G2GaspConfig, scene: Scene, frames: Sequence[int], images: Sequence[RGBImage]
) -> Matches:
    """The matches of one sequence, from tracks through `frames` of a scene. `images` are what Qwen2-VL gets of them.

    For a pack, join those of all sequences with `Matches.pack`.
    """
    tracks = [build_tracks(scene, frames, grid, config.keep) for grid in config.grids]
    depth = [scene.depth(frame) for frame in frames] if scene.has_depth else None
    return Collator(backbone).matches(Sample(frames=images, tracks=tracks, depth=depth))
