"""Whether the frames of a scene follow each other as they were taken.

Sequences for training are drawn from neighbouring frames. Nothing else depends on the order, and depth and poses of a
scrambled scene agree as well as before: only the distances between neighbours show it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from gasp_fast.data.scenes.natural_order import natural_key
from gasp_fast.data.scenes.scene import Scene, camera_centre

FEWEST_FRAMES = 12
MOST_FRAMES = 200  # whose poses are compared with each other, from the first on
AS_FAR = 0.6  # the motion to the next frame, as a share of that between any two frames
LEAST_MOTION = 0.02  # between any two frames, in units of `unit`, or radians; a camera at rest has no order
BETTER = 0.05  # share of pixels


def order_warnings(scene: Scene, unit: float, agreements: list[tuple[int, float]]) -> list[str]:
    """Why the order is probably wrong. `unit` is a typical distance; `agreements` are gaps and shares of pixels."""
    warnings = []
    names = scene.frame_names
    if names == sorted(names) and names != sorted(names, key=natural_key):
        warnings.append(
            f"frames are in the order of the characters of their names, {_first_swap(names)}; number them with "
            "leading zeros, or list them in the order in which they were taken"
        )
    for (near, near_share), (wide, wide_share) in pairwise(agreements):
        if wide_share > near_share + BETTER:
            warnings.append(
                f"frames {wide} apart agree better ({wide_share:.2f}) than frames {near} apart ({near_share:.2f}): the "
                "order of the frames is probably wrong"
            )
            break
    if len(scene) >= FEWEST_FRAMES:
        motion = _motions(scene, unit)
        to_next, to_any = np.diagonal(motion, 1).mean(), motion[np.triu_indices(len(motion), 1)].mean()
        if to_any > LEAST_MOTION and to_next > AS_FAR * to_any:
            warnings.append(
                "the camera moves as far from one frame to the next as between any two frames: the order of the frames "
                "is probably wrong, or they are no video"
            )
    return warnings


@np.errstate(over="ignore", invalid="ignore")
def _motions(scene: Scene, unit: float) -> np.ndarray:  # [n, n]
    """The motion of the camera between any two frames: distance in `unit` plus angle in radians."""
    poses = np.array([scene.pose(i) for i in range(min(len(scene), MOST_FRAMES))])
    centres = np.array([camera_centre(pose) for pose in poses])
    distance = np.linalg.norm(centres[:, None] - centres, axis=-1)
    traces = np.einsum("nij,mij->nm", poses[:, :3, :3], poses[:, :3, :3])
    motion: np.ndarray = distance / unit + np.arccos(np.clip((traces - 1) / 2, -1, 1))
    return motion


def _first_swap(names: list[str]) -> str:
    later, earlier = next((a, b) for a, b in pairwise(names) if natural_key(a) > natural_key(b))
    return f"{later} before {earlier}"
