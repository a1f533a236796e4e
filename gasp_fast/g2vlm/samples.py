"""Sequences of posed frames with depth, from scenes of any format: what is drawn, and what is read.

A sample is a function of its position in the stream, as in `training/stream.py`. The number of frames and their size
are functions of the step, so all sequences of a step have one shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset

from gasp_fast.backbones.frames import RGBImage
from gasp_fast.data.mixture import Mixture, Source
from gasp_fast.data.scenes.library import SceneEntry, folder_name
from gasp_fast.data.scenes.open_scenes import OpenScenes
from gasp_fast.data.scenes.scene import Scene, rigid_inverse
from gasp_fast.data.tracks.sequences import is_held_out
from gasp_fast.loss.matches import Matches
from gasp_fast.training.replacing import Replacing
from gasp_fast.training.skipped import Skipped
from gasp_fast.training.sources import usable_scenes

from .crop import Crop, Float
from .data_config import G2DataConfig, PackShape, frame_size, shape_of_step

JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, kw_only=True)
class GeometrySample:
    """F frames of one scene, cropped to one size."""

    scene: str
    frames: tuple[int, ...]  # their numbers in the scene
    images: NDArray[np.uint8]  # [F, H, W, 3]
    depth: NDArray[np.float32]  # [F, H, W], 0 where unknown or too far
    intrinsics: Float  # [F, 3, 3]
    pose: Float  # [F, 4, 4], from each camera to that of frame 0
    with_normals: bool = True
    photographs: Sequence[RGBImage] = ()  # whole, for questions about them
    messages: Sequence[dict[str, str]] = ()  # questions and answers
    matches: Matches | None = None  # between the tokens that Qwen2-VL makes of the photographs
    skipped: tuple[Skipped, ...] = ()  # samples in whose place this one is


def geometry_sample(
    scene: Scene,
    frames: Sequence[int],
    size: tuple[int, int],
    shift: tuple[float, float] = (0.0, 0.0),
    max_depth: float | None = None,
) -> GeometrySample:
    """Reads `frames` of a scene, cropped to `size` (height, width); `shift` as in `Crop.largest`."""
    scene.read_ahead(frames)
    crops = [Crop.largest(scene.image_size(frame), *size, shift) for frame in frames]
    read = list(zip(crops, frames, strict=True))
    depth = np.stack([crop.depth(scene.depth(frame)) for crop, frame in read])
    if max_depth is not None:
        depth[depth > max_depth] = 0
    return GeometrySample(
        scene=str(scene.root),
        frames=tuple(frames),
        images=np.stack([crop.image(scene.image(frame)) for crop, frame in read]),
        depth=depth,
        intrinsics=np.stack([crop.intrinsics(scene.intrinsics(frame)) for crop, frame in read]),
        pose=poses_in_first([scene.pose(frame) for frame in frames]),
    )


def poses_in_first(poses: Sequence[Float]) -> Float:
    """World-to-camera poses -> the maps from each camera to the first, `[F, 4, 4]`.

    Files store rotations with a few digits. Ours are the nearest true rotations, and the first is the identity.
    """
    relative = np.stack([poses[0] @ rigid_inverse(pose) for pose in poses])
    left, _, right = np.linalg.svd(relative[:, :3, :3])
    relative[:, :3, :3] = left @ right
    relative[0] = np.eye(4)
    return relative


def draw_frames(config: G2DataConfig, length: int, count: int, uniform: Callable[[], float]) -> tuple[int, ...]:
    """`count` frames of a scene of `length` frames in temporal order, from one to the next a drawn gap."""
    widest = (length - 1) // max(1, count - 1)  # that fits for every gap
    most = min(config.max_gap, widest)
    least = min(config.min_gap, most)
    gaps = [least + int(uniform() * (most - least + 1)) for _ in range(count - 1)]
    frame = int(uniform() * (length - sum(gaps)))
    frames = [frame]
    for gap in gaps:
        frames.append(frames[-1] + gap)
    return tuple(frames)


def jittered(images: NDArray[np.uint8], largest: float, uniform: Callable[[], float]) -> NDArray[np.uint8]:
    """Each frame `[F, H, W, 3]` with its own brightness, contrast and saturation, changed by up to `largest`."""
    changed = []
    for frame in images:
        picture = Image.fromarray(frame)
        for enhance in JITTERED:
            picture = enhance(picture).enhance(1 + largest * (2 * uniform() - 1))
        changed.append(np.asarray(picture))
    return np.stack(changed)


class GeometryScenes(Replacing[GeometrySample]):
    """The scenes under one root."""

    kinds = ("sequence",)
    advice = ""

    def __init__(self, config: G2DataConfig, number: int, shape: Callable[[int], PackShape], workers: int = 1) -> None:
        """Opens every scene once. `number` is that of the root; `shape` gives the shape at a position."""
        self.config, self.root, self.shape = config, config.roots[number], shape
        self.with_normals = not config.with_normals or config.with_normals[number]
        self.remarks = list[str]()
        entries, self.left_out = usable_scenes(self.root, workers, f"data.roots[{number}]")
        self.entries = [entry for entry in entries if self._is_usable(entry)]
        if not self.entries:
            why = f"; the first, {self.left_out[0]}" if self.left_out else f"; all are held out ({config.held_out})"
            raise ValueError(f"data.roots[{number}] = {self.root!r} has no scene to train on{why}")
        self.found = len(self.entries) + len(self.left_out)
        self.open = OpenScenes(Path(self.root), entries={entry.name: entry for entry in self.entries})

    def _is_usable(self, entry: SceneEntry) -> bool:
        if is_held_out(folder_name(Path(self.root), entry.name), self.config.held_out):
            return False
        if entry.frames < self.config.max_frames:
            reason = f"{entry.frames} frames, fewer than data.max_frames = {self.config.max_frames}"
            self.left_out.append(Skipped("scene", f"{self.root}/{entry.name}", reason))
            return False
        return True

    def __len__(self) -> int:
        return len(self.entries) * self.config.per_scene

    def load(self, epoch: int, index: int, position: int) -> GeometrySample:
        config, entry, shape = self.config, self.entries[index // self.config.per_scene], self.shape(position)
        uniform = random.Random(f"geometry/{config.seed}/{epoch}/{index}/{position}").random
        frames = draw_frames(config, entry.frames, shape.frames, uniform)
        across, down = (config.shift * (2 * uniform() - 1) for _ in range(2))
        size = shape.height, shape.width
        sample = geometry_sample(self.open[entry.name], frames, size, (across, down), config.max_depth)
        images = jittered(sample.images, config.jitter, uniform) if config.jitter else sample.images
        return replace(sample, images=images, with_normals=self.with_normals)

    def name(self, index: int) -> str:
        scene, place = divmod(index, self.config.per_scene)
        return f"{self.entries[scene].name}, sequence {place}"

    def fingerprint(self) -> dict[str, Any]:
        """Of the names, frames and poses that are read."""
        scenes = repr([(entry.name, entry.digest) for entry in self.entries])
        return {"scenes": len(self.entries), "digest": blake2b(scenes.encode(), digest_size=16).hexdigest()}


class GeometryStream(Dataset[GeometrySample]):
    """The endless interleaving of the roots, by position. Pickles into loader workers."""

    def __init__(self, config: G2DataConfig, batch_size: int) -> None:
        """`batch_size` is the number of sequences of a step, over all processes."""
        if not config.roots:
            raise ValueError("data.roots names no folder of scenes; give at least one")
        self.config, self.batch_size = config, batch_size
        workers = max(1, config.workers)
        self.sources = {
            f"{number}": GeometryScenes(config, number, self.shape, workers) for number in range(len(config.roots))
        }
        weights = config.weights or (1.0,) * len(config.roots)
        lengths = [len(source) for source in self.sources.values()]
        mixed = zip(self.sources, map(Source, lengths, weights), strict=True)
        self.mixture = Mixture(dict(mixed), config.seed)

    def shape_of_step(self, step: int) -> PackShape:
        return shape_of_step(self.config, step)

    def shape(self, position: int) -> PackShape:
        return self.shape_of_step(position // self.batch_size)

    def __getitem__(self, position: int) -> GeometrySample:
        """The sample at a position. If it cannot be read, another one of its root is in its place."""
        draw = self.mixture.draw(position)
        sample, _, skipped = self.sources[draw.source].first_usable(draw.epoch, draw.index, position)
        return replace(sample, skipped=skipped)

    @property
    def left_out(self) -> list[Skipped]:
        """The scenes that cannot be used, found before the first step."""
        return [one for source in self.sources.values() for one in source.left_out]

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        return {source.root: source.fingerprint() for source in self.sources.values()}

    def describe(self, position: int) -> str:
        """Name the sample at a position, for messages."""
        draw = self.mixture.draw(position)
        source = self.sources[draw.source]
        return f"{source.root}/{source.name(draw.index)}"


class UnseenSequences(Dataset[GeometrySample]):
    """Sequences for evaluation: nothing is drawn, crops are in the middle.

    From each scene `per_scene` sequences of `frames` frames, `stride` frames apart, their beginnings spread evenly.
    """

    def __init__(
        self,
        root: str,
        frames: int,
        stride: int = 1,
        per_scene: int = 1,
        side: int = 224,
        aspect: float = 1.0,
        held_out: float = 1.0,  # share of the scenes that training has left out; only these are taken
        max_depth: float | None = None,
        workers: int = 1,
    ) -> None:
        if min(frames, stride, per_scene) < 1:
            raise ValueError(f"frames = {frames}, stride = {stride}, per_scene = {per_scene} must be at least 1")
        self.size, self.max_depth = frame_size(side, aspect), max_depth
        entries, self.left_out = usable_scenes(root, workers, "root")
        self.sequences: list[tuple[str, tuple[int, ...]]] = []  # name of the scene, numbers of its frames
        for entry in entries:
            last = entry.frames - 1 - stride * (frames - 1)  # at which a sequence can begin
            if not is_held_out(folder_name(Path(root), entry.name), held_out):
                continue
            if last < 0:
                reason = f"{entry.frames} frames are too few for {frames} at a stride of {stride}"
                self.left_out.append(Skipped("scene", f"{root}/{entry.name}", reason))
                continue
            begins = dict.fromkeys(round(n * last / max(1, per_scene - 1)) for n in range(per_scene))
            self.sequences += [(entry.name, tuple(range(at, at + stride * frames, stride)[:frames])) for at in begins]
        if not self.sequences:
            why = f"; the first, {self.left_out[0]}" if self.left_out else f": held_out = {held_out}"
            raise ValueError(f"root = {root!r} has no sequence to evaluate{why}")
        self.open = OpenScenes(Path(root), entries={entry.name: entry for entry in entries})

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> GeometrySample:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        name, frames = self.sequences[index]
        return geometry_sample(self.open[name], frames, self.size, max_depth=self.max_depth)
