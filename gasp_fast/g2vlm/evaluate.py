"""Evaluates a G²VLM on sequences of scenes with known depth and poses, and resumes where a stopped evaluation ended.

| family | of                                                             | alignment                        |
| ------ | -------------------------------------------------------------- | -------------------------------- |
| depth  | all valid pixels of a sequence                                 | one scale                        |
| points | points of all frames in the camera of frame 0, by depth + pose | similarity (Umeyama), then ICP   |
| poses  | all pairs of frames                                            | none                             |

Beside the model stands a baseline that knows the truth's unit but has seen no image: every pixel at the constant depth
with the least AbsRel on that sequence, and cameras that do not move. The numbers of a sequence are written as soon as
they exist. Sequences that cannot be read, or have no depth, are left out, named, and tried again by the next run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gasp_fast.config.limits import check_whole
from gasp_fast.data.errors import difference
from gasp_fast.data.scenes.library import find_scenes, folder_name
from gasp_fast.data.tracks.sequences import is_held_out
from gasp_fast.files import append, one_line, read_json_lines, write_atomically

from .batch import PATCH, GeometryBatch
from .collator import GeometryCollator
from .data_config import MOST_FRAMES, MOST_SIDE
from .held_out import predicted
from .losses import Geometry
from .metrics import depth_metrics, point_metrics, pose_metrics
from .samples import GeometrySample, UnseenSequences
from .saved import SavedGeometryModel, finite_predictions
from .scale import best_scale, evenly_chosen

SEQUENCES = "sequences.jsonl"
LEAST_POINTS, MOST_POINTS = 3, 100_000  # of a cloud; nearest points are searched among all
Numbers = dict[str, float]  # of one sequence, by the name of the metric


@dataclass(frozen=True, kw_only=True)
class GeometryEvaluationConfig:
    """Which sequences, at which size, and how points are compared."""

    sequences: int = 100  # at most, spread evenly over the scenes
    frames: int = 4  # of a sequence
    stride: int = 4  # frames of the scene from one to the next
    side: int = 224  # of a square with as many pixels as a frame gets
    aspect: float = 1.0  # width / height
    held_out: float = 0.0  # only the scenes that training with this share holds out; 0: all
    max_depth: float | None = None  # in the scenes' unit; points beyond it do not count
    points: int = 4096  # of a sequence whose nearest points are searched, spread evenly
    reach: float = 0.1  # in the scenes' unit: ICP pairs no points farther apart

    def __post_init__(self) -> None:
        check_whole(self, ("sequences", "stride"))
        check_whole(self, ("frames",), most=MOST_FRAMES)
        check_whole(self, ("side",), least=PATCH, most=MOST_SIDE)
        check_whole(self, ("points",), least=LEAST_POINTS, most=MOST_POINTS)
        if not 0.1 <= self.aspect <= 10:
            raise ValueError(f"aspect = {self.aspect} is width / height; give 0.1 to 10")
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"held_out = {self.held_out} is a share; give 0 to 1")
        for name in ("max_depth", "reach"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value} must be finite and above 0")


class GeometrySequences:
    """The sequences of an evaluation, by number."""

    def __init__(self, root: Path, config: GeometryEvaluationConfig) -> None:
        names = [folder_name(root, name) for name in find_scenes(root)]
        share = config.held_out or 1.0
        scenes = max(1, sum(is_held_out(name, share) for name in names))
        self.config = config
        self.found = UnseenSequences(
            str(root), config.frames, config.stride, -(-config.sequences // scenes), config.side, config.aspect,
            held_out=share, max_depth=config.max_depth,
        )  # fmt: skip
        last, count = len(self.found) - 1, min(config.sequences, len(self.found))
        self.chosen = [int(one) for one in np.linspace(0, last, count).round()]

    def __len__(self) -> int:
        return len(self.chosen)

    def sample(self, number: int) -> GeometrySample:
        return self.found[self.chosen[number]]

    def place(self, number: int) -> dict[str, Any]:
        """The scene and its frames."""
        name, frames = self.found.sequences[self.chosen[number]]
        return {"scene": name, "frames": list(frames)}

    def settings(self) -> dict[str, Any]:
        """All that the numbers of sequences depend on, but for the model."""
        entries = self.found.open.entries.values()
        return {**asdict(self.config), "scenes": {entry.name: entry.digest for entry in entries}}


@dataclass(frozen=True)
class SequenceOutcome:
    model: Numbers
    baseline: Numbers


@dataclass(frozen=True)
class GeometryEvaluation:
    outcomes: dict[int, SequenceOutcome]
    left_out: dict[int, str]  # number of a sequence -> why


def evaluate_geometry(
    saved: SavedGeometryModel,
    sequences: GeometrySequences,
    out: Path,
    *,
    fresh: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> GeometryEvaluation:
    """Runs the model on every sequence whose numbers are not in `out`."""
    path = out / SEQUENCES
    if fresh:
        path.unlink(missing_ok=True)
    settings = json.loads(json.dumps({**sequences.settings(), "model": saved.name, "weights": saved.fingerprint}))
    outcomes, left_out = _stored(path, settings), dict[int, str]()
    for number in range(len(sequences)):
        progress(len(outcomes) + len(left_out))
        if number in outcomes:
            continue
        try:
            pack = GeometryCollator()([sequences.sample(number)])
            _check_known(pack)
        except (OSError, ValueError) as error:
            left_out[number] = one_line(error)
            continue
        outcomes[number] = outcome_of(prediction(saved, pack), pack, sequences.config)
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps({"settings": settings}) + "\n").encode())
        append(path, json.dumps({"sequence": number, **asdict(outcomes[number])}) + "\n")
    progress(len(sequences))
    if not outcomes:
        first = min(left_out)
        raise ValueError(
            f"none of {len(sequences)} sequences can be evaluated; the first, of {sequences.place(first)['scene']}: "
            f"{left_out[first]}"
        )
    return GeometryEvaluation(dict(sorted(outcomes.items())), left_out)


def _stored(path: Path, settings: dict[str, Any]) -> dict[int, SequenceOutcome]:
    """The outcomes of a stopped evaluation with the same settings."""
    lines = read_json_lines(path)
    if path.exists() and (not lines or "settings" not in lines[0]):
        raise ValueError(f"{path} is damaged; give another --out, or --fresh to start again")
    if lines and (change := difference(lines[0]["settings"], settings)):
        raise ValueError(
            f"{path.parent} holds an evaluation with other settings ({change}); give another --out, or --fresh to "
            "start again"
        )
    whole = [one for one in lines[1:] if {"sequence", "model", "baseline"} <= one.keys()]
    return {one["sequence"]: SequenceOutcome(one["model"], one["baseline"]) for one in whole}


def _check_known(pack: GeometryBatch) -> None:
    if (known := int(pack.valid.sum())) < LEAST_POINTS:
        raise ValueError(f"depth is known at {known} of {pack.valid.numel()} pixels")


def prediction(saved: SavedGeometryModel, pack: GeometryBatch) -> Geometry:
    """The geometry of a pack, on the CPU."""
    with finite_predictions(saved.name):
        found = predicted(saved.model, pack, saved.model.marks.device)
    if not all(torch.isfinite(getattr(found, name)).all() for name in ("local", "world", "rotation", "translation")):
        raise ValueError(f"{saved.name} predicts NaN or infinite geometry: its weights are damaged, or diverged")
    return found


def outcome_of(found: Geometry, pack: GeometryBatch, config: GeometryEvaluationConfig) -> SequenceOutcome:
    """Of a pack of one sequence."""
    baseline = numbers_of(flat_geometry(pack), pack, config, with_scale=False)
    return SequenceOutcome(numbers_of(found, pack, config), baseline)


def numbers_of(
    found: Geometry, pack: GeometryBatch, config: GeometryEvaluationConfig, with_scale: bool = True
) -> Numbers:
    """`with_scale`: the depth has no unit, and is scaled."""
    true, valid = pack.true, pack.valid[0]
    depth = depth_metrics(found.local[0, ..., 2], true.local[0, ..., 2], valid, with_scale)
    position, chosen = evenly_chosen(valid.flatten()[None], config.points)
    at = position[0][chosen[0]]
    points = point_metrics(found.world[0].flatten(0, 2)[at], true.world[0].flatten(0, 2)[at], config.reach)
    numbers = {**asdict(depth), **asdict(points)}
    if config.frames > 1:
        poses = pose_metrics(found.rotation[0], found.translation[0], true.rotation[0], true.translation[0])
        numbers |= asdict(poses)
    return numbers


def flat_geometry(pack: GeometryBatch) -> Geometry:
    """The baseline: the rays of the true cameras, cut off at the best constant depth, and poses that are the identity.

    It has the unit of the truth.
    """
    true = pack.true
    depth = best_constant_depth(true.local[0, ..., 2][pack.valid[0]])
    z = true.local[..., 2:]
    local = torch.where(z > 0, true.local / torch.where(z > 0, z, 1), torch.ones_like(z)) * depth
    rotation = torch.eye(3).expand_as(true.rotation)
    return Geometry(local, local, rotation, torch.zeros_like(true.translation))


def best_constant_depth(depth: Tensor) -> Tensor:
    """The constant c with the least mean |c - d| / d of depths d [n]: their median with weights 1 / d."""
    return best_scale(torch.ones_like(depth)[None], depth[None], 1 / depth[None])[0]


def summary(outcomes: Sequence[Numbers]) -> dict[str, dict[str, float]]:
    """Mean and median of each number over sequences."""
    values = {name: [one[name] for one in outcomes] for name in outcomes[0]}
    return {name: {"mean": float(np.mean(one)), "median": float(np.median(one))} for name, one in values.items()}
