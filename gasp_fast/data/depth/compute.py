"""Computes depth for a scene that has none: from COLMAP's stereo maps, or from a monocular model and sparse points.

Both write the folder `computed_depth/` (see `scenes/computed_depth.py`): maps of the undistorted frames in the scene's
own unit, and the error of each map at the frame's sparse points. A predictor is any function from an image to a map;
whether it predicts depth or inverse depth is found by trying both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gasp_fast.data.scenes.computed_depth import INDEX, DepthIndex, FrameFit, computed_folder, write_index
from gasp_fast.data.scenes.depth_maps import read_depth
from gasp_fast.data.scenes.formats.colmap import DEPTH_FOLDER, find_model
from gasp_fast.data.scenes.formats.colmap_model import ModelImage, read_model
from gasp_fast.data.scenes.library import scene_digest
from gasp_fast.data.scenes.scene import Scene, camera_centre, size_fault
from gasp_fast.files import replacing

from .alignment import FEWEST_POINTS, LARGEST_ERROR, SPACES, Alignment, Space, align

Predictor = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] -> float [h, w]
Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps the frame numbers, such as a progress bar
FRAMES_TO_FIND_SPACE = 8
# Within this range maps are stored as float16: half the bytes, and a relative error of 0.05 %, a hundredth of the 5 %
# by which two views may differ.
FLOAT16_RANGE = (1e-3, 6e4)


@dataclass(frozen=True)
class SparsePoints:
    """COLMAP's points in one frame: pixels of the undistorted image, and the depth there in the scene's unit."""

    pixel: np.ndarray  # float64 [n, 2]
    depth: np.ndarray  # float64 [n]

    def sample(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # [n]
        """The values of a map of any resolution at the points; `size` is that of the image."""
        height, width = values.shape
        column = np.clip(self.pixel[:, 0] * (width / size[0]), 0, width - 1).astype(int)
        row = np.clip(self.pixel[:, 1] * (height / size[1]), 0, height - 1).astype(int)
        return values[row, column]


def has_mvs(scene: Scene) -> bool:
    """Whether the scene's folder holds maps of COLMAP's multi-view stereo."""
    located = find_model(scene.root)
    return located is not None and any((located[0] / DEPTH_FOLDER).glob("**/*.geometric.bin"))


def depth_from_mvs(scene: Scene, progress: Progress = iter) -> DepthIndex:
    """Resamples the maps of the dense workspace to the frames of `scene`."""
    located = find_model(scene.root)
    if located is None or not has_mvs(scene):
        raise ValueError(
            f"{scene.root}: no {DEPTH_FOLDER}/*.geometric.bin; run colmap patch_match_stereo, or give --model"
        )
    workspace, model = located
    images = _by_frame(scene, read_model(model))
    unit = _unit(scene, images)
    points = sparse_points(scene)

    def frame_depth(i: int) -> tuple[np.ndarray | None, FrameFit]:
        image = images.get(scene.frame_names[i])
        path = workspace / DEPTH_FOLDER / f"{image.name}.geometric.bin" if image else None
        if image is None or path is None or not path.is_file():
            return None, FrameFit(None, reason="no stereo map")
        depth = _resampled(read_depth(path, unit), image, scene.intrinsics(i), scene.image_size(i))
        return depth, _mvs_fit(depth, points.get(scene.frame_names[i]), scene.image_size(i))

    return _write(scene, DepthIndex(source="mvs", space="depth"), frame_depth, progress)


def depth_from_predictor(scene: Scene, predict: Predictor, name: str = "", progress: Progress = iter) -> DepthIndex:
    """Runs `predict` on every frame and aligns each map to the frame's sparse points."""
    points = sparse_points(scene)
    if not any(len(known.depth) >= FEWEST_POINTS for known in points.values()):
        raise ValueError(
            f"{scene.root}: no frame has {FEWEST_POINTS} COLMAP points, so predicted depth has no scale; "
            "add the sparse model (colmap/sparse/0)"
        )
    space = _predicted_space(scene, predict, points)

    def frame_depth(i: int) -> tuple[np.ndarray | None, FrameFit]:
        known = points.get(scene.frame_names[i])
        if known is None or len(known.depth) < FEWEST_POINTS:
            count = 0 if known is None else len(known.depth)
            return None, FrameFit(None, count, reason=f"{count} sparse points; {FEWEST_POINTS} are needed")
        predicted = predict(scene.image(i))
        fit = align(known.sample(predicted, scene.image_size(i)), known.depth, space)
        error = fit.error if np.isfinite(fit.error) else None
        depth = fit.apply(predicted) if fit.fault is None else None
        return depth, FrameFit(None, fit.points, error, fit.fault or "")

    return _write(scene, DepthIndex(source="model", model=name, space=space), frame_depth, progress)


def sparse_points(scene: Scene) -> dict[str, SparsePoints]:
    """The COLMAP points that each frame observes inside its undistorted image, by frame name."""
    if scene.sparse_model is None:
        return {}
    images = _by_frame(scene, read_model(scene.sparse_model, with_points=True))
    unit = _unit(scene, images)
    points = {}
    for i, name in enumerate(scene.frame_names):
        image = images.get(name)
        if image is None or image.points is None:
            continue
        in_camera = image.points @ image.pose[:3, :3].T + image.pose[:3, 3]
        in_camera = in_camera[in_camera[:, 2] > 0]
        pixel = (in_camera @ scene.intrinsics(i).T)[:, :2] / in_camera[:, 2:]
        inside = ((pixel >= 0) & (pixel < scene.image_size(i))).all(axis=1)
        points[name] = SparsePoints(pixel[inside], in_camera[inside, 2] * unit)
    return points


def _by_frame(scene: Scene, images: list[ModelImage]) -> dict[str, ModelImage]:
    """The model's images by the names of the scene's frames, which may lack folders and suffixes."""
    by_path = {str(Path(image.name).with_suffix("")): image for image in images if Path(image.name).name}
    by_stem = {Path(name).name: image for name, image in by_path.items()}
    named = {name: by_path.get(name) or by_stem.get(Path(name).name) for name in scene.frame_names}
    return {name: image for name, image in named.items() if image is not None and size_fault(image.size) is None}


def _unit(scene: Scene, images: dict[str, ModelImage]) -> float:
    """The model's unit in units of the scene.

    Model and scene may differ by a rigid motion, and Nerfstudio may have rescaled one of them. The ratio of the spreads
    of the camera centres is the scale: a rigid motion does not change a spread.
    """
    shared = [i for i, name in enumerate(scene.frame_names) if name in images]
    in_scene = [camera_centre(scene.pose(i)) for i in shared]
    in_model = [camera_centre(images[scene.frame_names[i]].pose) for i in shared]
    if len(shared) < 2:
        return 1.0
    spread = [float(np.linalg.norm(np.array(centres) - np.mean(centres, axis=0))) for centres in (in_scene, in_model)]
    return spread[0] / spread[1] if min(spread) > 1e-9 else 1.0


def _resampled(
    depth: np.ndarray, image: ModelImage, intrinsics: np.ndarray, size: tuple[int, int]
) -> np.ndarray:  # float32 [H, W]
    """A map of the workspace's pinhole camera, resampled for another pinhole camera at the same pose: nearest pixel."""
    height, width = depth.shape
    scale = np.array([width / image.size[0], height / image.size[1]])
    camera = image.intrinsics
    x = (np.arange(size[0]) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (np.arange(size[1]) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    column = np.floor((x * camera[0, 0] + camera[0, 2]) * scale[0]).astype(int)
    row = np.floor((y * camera[1, 1] + camera[1, 2]) * scale[1]).astype(int)
    seen = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None, :]
    values = depth[np.clip(row, 0, height - 1)[:, None], np.clip(column, 0, width - 1)[None, :]]
    return np.where(seen, values, np.float32(0))


def _mvs_fit(depth: np.ndarray, known: SparsePoints | None, size: tuple[int, int]) -> FrameFit:
    """The error of a stereo map, which needs no alignment, at the sparse points where it has a depth."""
    if not (depth > 0).any():
        return FrameFit(None, reason="the stereo map is empty")
    if known is None or not len(known.depth):
        return FrameFit(None)
    sampled = known.sample(depth, size)
    compared = sampled > 0
    if not compared.any():
        return FrameFit(None)
    error = float(np.median(np.abs(sampled - known.depth)[compared] / known.depth[compared]))
    bad = compared.sum() >= FEWEST_POINTS and error > LARGEST_ERROR
    return FrameFit(None, int(compared.sum()), error, f"median error {error:.3f}" if bad else "")


def _predicted_space(scene: Scene, predict: Predictor, points: dict[str, SparsePoints]) -> Space:
    """The space in which predictions fit better, over a few frames: a property of the predictor, not of a frame."""
    usable = [
        i for i, name in enumerate(scene.frame_names) if name in points and len(points[name].depth) >= FEWEST_POINTS
    ]
    chosen = [usable[k] for k in np.unique(np.linspace(0, len(usable) - 1, FRAMES_TO_FIND_SPACE).round().astype(int))]
    errors: dict[Space, list[float]] = {space: [] for space in SPACES}
    for i in chosen:
        known = points[scene.frame_names[i]]
        predicted = known.sample(predict(scene.image(i)), scene.image_size(i))
        for space in SPACES:
            fit: Alignment = align(predicted, known.depth, space)
            errors[space].append(fit.error if fit.scale > 0 else np.inf)
    return min(SPACES, key=lambda space: float(np.median(errors[space])))


def _write(
    scene: Scene,
    index: DepthIndex,
    frame_depth: Callable[[int], tuple[np.ndarray | None, FrameFit]],
    progress: Progress,
) -> DepthIndex:
    """Deletes the old index, writes the maps, then the index: a killed run leaves no index of incomplete maps."""
    folder = computed_folder(scene)
    (folder / INDEX).unlink(missing_ok=True)
    for leftover in folder.glob("**/.*.partial"):  # of a killed run
        leftover.unlink(missing_ok=True)
    index.scene = scene_digest(scene)
    for i in progress(range(len(scene))):
        name = scene.frame_names[i]
        try:
            depth, fit = frame_depth(i)
        except OSError as error:  # a damaged file costs its frame, not the scene
            depth, fit = None, FrameFit(None, reason=str(error).replace(f"{scene.root}{os.sep}", ""))
        if depth is not None and not fit.reason:
            fit = replace(fit, file=f"{name}.npy")
            _save(depth, folder / f"{name}.npy")
        index.frames[name] = fit
    write_index(folder, index)
    return index


def _save(depth: np.ndarray, path: Path) -> None:
    known = depth[depth > 0]
    half = known.size and known.min() >= FLOAT16_RANGE[0] and known.max() <= FLOAT16_RANGE[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, depth.astype(np.float16) if half else depth)
