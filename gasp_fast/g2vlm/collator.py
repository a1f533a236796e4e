"""From samples to packs, and from positions in the stream to the loader of a training process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gasp_fast.backbones import Backbone, Conversation
from gasp_fast.loss.matches import Matches

from .batch import GeometryBatch, Questions
from .crop import unprojected
from .losses import Geometry
from .samples import GeometrySample

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, in 0..1


class GeometryCollator:
    """Turns samples of one shape into a `GeometryBatch`. Pickles into loader workers.

    With a `backbone`, that of Qwen2-VL, the pack has questions; every sample must then have messages.
    """

    def __init__(self, backbone: Backbone | None = None) -> None:
        self.backbone = backbone

    def __call__(self, samples: Sequence[GeometrySample]) -> GeometryBatch:
        if len(shapes := {sample.images.shape for sample in samples}) != 1:
            raise ValueError(f"a pack has sequences of one shape, these have {sorted(shapes)}")
        images = torch.from_numpy(np.stack([sample.images for sample in samples])).movedim(-1, 2)  # [B, F, 3, H, W]
        matches = [sample.matches for sample in samples if sample.matches is not None]  # of all, or of none
        return GeometryBatch(
            images=normalised(images),
            true=true_geometry(samples),
            valid=torch.from_numpy(np.stack([sample.depth > 0 for sample in samples])),
            with_normals=torch.tensor([sample.with_normals for sample in samples]),
            questions=None
            if self.backbone is None
            else encoded_questions(
                self.backbone, [Conversation(sample.photographs, sample.messages) for sample in samples]
            ),
            matches=Matches.pack(matches) if matches else None,
            skipped=tuple(one for sample in samples for one in sample.skipped),
        )


def normalised(images: Tensor) -> Tensor:
    """uint8 `[..., 3, H, W]` -> float32, as the encoder takes them."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def true_geometry(samples: Sequence[GeometrySample]) -> Geometry:
    """Points are computed in float64 and rounded once; where depth is unknown they are the camera's centre."""
    depth, intrinsics, pose = (
        np.stack([getattr(sample, name) for sample in samples]) for name in ("depth", "intrinsics", "pose")
    )
    local = unprojected(depth, intrinsics)  # [B, F, H, W, 3]
    turned, shift = pose[..., :3, :3], pose[..., :3, 3]
    world = np.einsum("bfij,bfhwj->bfhwi", turned, local) + shift[:, :, None, None]
    return Geometry(_float32(local), _float32(world), _float32(turned), _float32(shift))


def check_backbone(backbone: Backbone) -> None:
    if backbone.model_type != "qwen2_vl":
        raise ValueError(f"backbone = {backbone.source!r} is a {backbone.model_type}; load that of a Qwen2-VL")


def encoded_questions(
    backbone: Backbone, talks: Sequence[Conversation], add_generation_prompt: bool = False
) -> Questions:
    """Messages about whole photographs, one row each. They may end where the next answer begins."""
    check_backbone(backbone)
    inputs = backbone.encode(talks, add_generation_prompt).inputs
    names = ("input_ids", "labels", "attention_mask", "pixel_values", "image_grid_thw")
    return Questions(**{name: inputs[name] for name in names})


def _float32(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
