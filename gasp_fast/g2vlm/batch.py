"""What a step of G²VLM is computed from: B sequences of F frames of H x W pixels, a "pack"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gasp_fast.loss.matches import Matches
from gasp_fast.training.skipped import Skipped

from .losses import Geometry

PATCH = 14  # pixels along a side of an encoder's patch; H and W are multiples of it
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Questions:
    """One conversation about each sequence, as Qwen2-VL's processor encodes it. Its images are the pack's frames."""

    input_ids: Tensor  # int64 [B, S], padded on the right
    labels: Tensor  # int64 [B, S]; -100 for tokens that are not learned: all but those of answers
    attention_mask: Tensor  # int64 [B, S]; 0 for padding
    pixel_values: Tensor  # float32 [patches, 1176], of all images
    image_grid_thw: Tensor  # int64 [images, 3], rows and columns of patches

    def to(self, device: torch.device | str) -> Questions:
        return _mapped(self, lambda value: value.to(device))


@dataclass(frozen=True)
class GeometryBatch:
    """A pack, with the truth about its geometry."""

    images: Tensor  # float32 [B, F, 3, H, W], normalised by ImageNet's mean and deviation
    true: Geometry  # points [B, F, H, W, 3], poses as maps from the camera to that of frame 0
    valid: Tensor  # bool [B, F, H, W], points whose truth is known
    with_normals: Tensor  # bool [B], sequences whose depth is smooth enough for normals
    questions: Questions | None = None  # for the joint stage
    matches: Matches | None = None  # between the ViT tokens of the questions' images, for `supervision`
    skipped: tuple[Skipped, ...] = ()  # samples that could not be read, in whose place others are

    @property
    def patches(self) -> int:
        """Of all frames: the geometric tokens."""
        batch, frames, _, height, width = self.images.shape
        return batch * frames * (height // PATCH) * (width // PATCH)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GeometryBatch:
        return _mapped(self, lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GeometryBatch:
        """Called by torch's `DataLoader`."""
        return _mapped(self, lambda value: value.pin_memory())


def _mapped(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """A copy of a dataclass, in which `function` is applied to every tensor, and to matches."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor | Matches):
            return function(value)
        return _mapped(value, function) if is_dataclass(value) else value

    changed = {field.name: of(getattr(batch, field.name)) for field in fields(batch)}  # type: ignore[arg-type]
    return replace(batch, **changed)  # type: ignore[type-var]
