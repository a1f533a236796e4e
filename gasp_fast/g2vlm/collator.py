"""From samples to packs, and from positions in the stream to the loader of a training process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gasp_fast.backbones import Backbone, Conversation
from gasp_fast.training.signals import end_with_trainer
from gasp_fast.training.stream import StreamBatches

from .batch import GeometryBatch, Questions
from .crop import unprojected
from .data_config import PackShape
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
        return GeometryBatch(
            images=normalised(images),
            true=true_geometry(samples),
            valid=torch.from_numpy(np.stack([sample.depth > 0 for sample in samples])),
            with_normals=torch.tensor([sample.with_normals for sample in samples]),
            questions=None if self.backbone is None else encoded_questions(self.backbone, samples),
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


def encoded_questions(backbone: Backbone, samples: Sequence[GeometrySample]) -> Questions:
    """The samples' messages about their whole photographs, one row each."""
    if backbone.model_type != "qwen2_vl":
        raise ValueError(f"backbone = {backbone.source!r} is a {backbone.model_type}; questions are for qwen2_vl")
    talks = [Conversation(sample.photographs, sample.messages) for sample in samples]
    inputs = backbone.encode(talks).inputs
    names = ("input_ids", "labels", "attention_mask", "pixel_values", "image_grid_thw")
    return Questions(**{name: inputs[name] for name in names})


def _float32(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


@dataclass(frozen=True)
class PackShare:
    """This process's packs of each step: a contiguous part of the step's sequences, as many at once as fit."""

    rank: int
    world_size: int
    batch_size: int  # sequences of a step, over all processes
    tokens_at_once: int  # most patches of a pack; one sequence is always taken
    shape: Callable[[int], PackShape]  # of a step

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size = {self.batch_size} sequences do not divide among {self.world_size} processes; "
                f"give a multiple of {self.world_size}"
            )

    def micro_batches(self, step: int) -> list[list[int]]:
        """The positions in each pack of a step, counted from 0. Every process has as many packs, of the same sizes."""
        own = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * own
        packs = -(-own // max(1, self.tokens_at_once // self.shape(step).tokens))
        ends = [first + own * number // packs for number in range(packs + 1)]
        return [list(range(start, end)) for start, end in pairwise(ends)]


def make_loader(
    stream: Dataset[GeometrySample],
    share: PackShare,
    steps: int,
    done: int = 0,
    workers: int = 0,
    backbone: Backbone | None = None,
    pin_memory: bool = False,
) -> DataLoader[GeometryBatch]:
    """Loads the packs of this process, from the step after `done` on."""
    return DataLoader(
        stream,
        batch_sampler=StreamBatches(share, steps, done),
        collate_fn=GeometryCollator(backbone),
        num_workers=workers,
        pin_memory=pin_memory,
        # A fork would copy the threads and the GPU context of this process, which do not survive that.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=end_with_trainer if workers else None,
    )
