"""The exact geometry of a synthetic scene by ray casting in NumPy: an oracle that shares no code with the renderer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.synthetic.scenes import SyntheticScene

Float = NDArray[np.float64]


class ExactTracks(NamedTuple):
    """The true tracks of surface points; arrays as in `Tracks`."""

    uv: Float  # [T, F, 2]
    visible: NDArray[np.bool_]  # [T, F]
    depth: Float  # [T, F]


def trace(scene: SyntheticScene, origins: Float, directions: Float) -> tuple[Float, NDArray[np.int64]]:
    """First surface along each of `[N]` rays: distance in units of the direction, and surface number (slab test)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exits = np.where(
            directions == 0, np.inf, (np.where(directions > 0, scene.room[1], scene.room[0]) - origins) / directions
        )  # [N, 3]
        axis = exits.argmin(axis=1)
        rows = np.arange(len(axis))
        distance, surface = exits[rows, axis], 2 * axis + (directions[rows, axis] > 0)
        for number, box in enumerate(scene.boxes):
            origin, direction = (origins - box.centre) @ box.rotation, directions @ box.rotation
            to_low, to_high = (-np.array(box.half) - origin) / direction, (np.array(box.half) - origin) / direction
            entry_per_axis = np.minimum(to_low, to_high)  # [N, 3]
            entry_axis = entry_per_axis.argmax(axis=1)
            entry, leave = entry_per_axis[rows, entry_axis], np.maximum(to_low, to_high).min(axis=1)
            hit = (entry <= leave) & (entry > 1e-6) & (entry < distance)
            distance = np.where(hit, entry, distance)
            face = 2 * entry_axis + (direction[rows, entry_axis] < 0)
            surface = np.where(hit, 6 + 6 * number + face, surface)
    return distance, surface


def rays(scene: SyntheticScene, index: int, uv: Float) -> tuple[Float, Float]:
    """Origins and directions `[N, 3]` of the rays through `[N, 2]` pixels; distances along them are depths."""
    camera = np.concatenate([uv, np.ones((len(uv), 1))], axis=1) @ np.linalg.inv(scene.intrinsics).T
    pose = scene.camera_to_world[index]
    return np.broadcast_to(pose[:3, 3], camera.shape), camera @ pose[:3, :3].T


def exact_tracks(
    scene: SyntheticScene, frames: Sequence[int], query: Float, border: float = 4.0, tolerance: float = 0.0
) -> ExactTracks:
    """The true tracks of `[T, 2]` query pixels of `frames[0]`.

    A point is visible if it projects at least `border` pixels inside the image and nothing lies between it and the
    camera: the ray to the point is cast again, without any depth map. An occluder in front of the point by less than
    the share `tolerance` of its distance is ignored, as the recipe with its 5 % does.
    """
    origins, directions = rays(scene, frames[0], query)
    points = origins + trace(scene, origins, directions)[0][:, None] * directions  # [T, 3]
    inside = np.array([scene.config.width, scene.config.height]) - border
    uv = np.empty((len(query), len(frames), 2))
    depth = np.empty((len(query), len(frames)))
    visible = np.ones((len(query), len(frames)), bool)
    for place, frame in enumerate(frames):
        pose = scene.camera_to_world[frame]
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        depth[:, place] = local[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            uv[:, place] = (local @ scene.intrinsics.T)[:, :2] / local[:, 2:]
        if place == 0:
            continue
        reach, _ = trace(scene, np.broadcast_to(pose[:3, 3], points.shape), points - pose[:3, 3])
        in_view = (local[:, 2] > 0) & np.all((uv[:, place] >= border) & (uv[:, place] <= inside), axis=1)
        visible[:, place] = in_view & (reach > 1 - max(tolerance, 1e-6))
    return ExactTracks(uv, visible, depth)
