"""Predictions on sequences of unseen scenes, and how good they are: depth by one scale a sequence, poses by pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gasp_fast.training.skipped import Skipped

from .batch import GeometryBatch
from .collator import GeometryCollator
from .config import G2TrainConfig
from .data_config import G2DataConfig
from .losses import Geometry
from .metrics import DepthMetrics, PoseMetrics, depth_metrics, pose_metrics
from .model import G2VLM
from .samples import UnseenSequences


@dataclass(frozen=True)
class Scores:
    """Of one sequence."""

    depth: DepthMetrics
    poses: PoseMetrics


def predicted(model: G2VLM, pack: GeometryBatch, device: torch.device) -> Geometry:
    """The geometry of a pack, on the CPU. The model must be in evaluation mode."""
    with torch.no_grad():
        found = model(pack.images.to(device)).geometry
    return Geometry(found.local.cpu(), found.world.cpu(), found.rotation.cpu(), found.translation.cpu())


def scores_of(model: G2VLM, pack: GeometryBatch, device: torch.device) -> Scores:
    """Of a pack with one sequence."""
    found, true = predicted(model, pack, device), pack.true
    depth = depth_metrics(found.local[0, ..., 2], true.local[0, ..., 2], pack.valid[0])
    return Scores(depth, pose_metrics(found.rotation[0], found.translation[0], true.rotation[0], true.translation[0]))


def mean_scores(scores: Sequence[Scores]) -> dict[str, float]:
    """The mean of each number over sequences."""
    return {
        "abs_rel": float(np.mean([one.depth.abs_rel for one in scores])),
        "delta": float(np.mean([one.depth.delta for one in scores])),
        "rra": float(np.mean([one.poses.rra for one in scores])),
        "rta": float(np.mean([one.poses.rta for one in scores])),
        "auc": float(np.mean([one.poses.auc for one in scores])),
    }


class UnseenScenes:
    """The sequences on which a run is evaluated while it trains, by index."""

    def __init__(self, config: G2TrainConfig) -> None:
        evaluate, data = config.evaluate, config.data
        number, more = divmod(evaluate.sequences, len(evaluate.scenes))
        if not number:
            raise ValueError(f"evaluate.sequences = {evaluate.sequences} is less than one for each of evaluate.scenes")
        self.sets: list[tuple[UnseenSequences, int]] = []  # a sequence: its set and its number there
        self.left_out: list[Skipped] = []
        for at, root in enumerate(evaluate.scenes):
            found = UnseenSequences(
                root,
                evaluate.frames,
                evaluate.stride,
                side=data.side,
                held_out=_share_left_out(data, root),
                max_depth=data.max_depth,
            )
            self.left_out += found.left_out
            wanted = number + (at < more)
            chosen = np.unique(np.linspace(0, len(found) - 1, min(wanted, len(found))).round().astype(int))
            self.sets += [(found, int(one)) for one in chosen]

    def __len__(self) -> int:
        return len(self.sets)

    def pack(self, index: int) -> GeometryBatch:
        found, number = self.sets[index]
        return GeometryCollator()([found[number]])

    def usable(self, indices: Sequence[int]) -> list[int]:
        """Those that can be read, and know the depth of something."""
        return [index for index in indices if self._is_usable(index)]

    def _is_usable(self, index: int) -> bool:
        try:
            return bool(self.pack(index).valid.any())
        except (OSError, ValueError):
            return False

    def metrics(self, outcomes: Mapping[int, Scores]) -> dict[str, Any]:
        return {"sequences": len(outcomes), **mean_scores([outcomes[index] for index in sorted(outcomes)])}


def _share_left_out(data: G2DataConfig, scenes: str) -> float:
    """The share of `scenes` that training leaves out, by `data.held_out`; 1: all, because it uses none of them."""
    if Path(scenes).resolve() not in [Path(root).resolve() for root in data.roots]:
        return 1.0
    if not data.held_out:
        raise ValueError(
            f"evaluate.scenes = {scenes!r} is trained on; set data.held_out=0.05 to leave a share of its scenes out of "
            "training, or name other scenes"
        )
    return data.held_out
