"""`View`: a photograph with its depth at a reduced size, for the checks that compare photographs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gasp_fast.data.scenes.scene import Scene

WIDTH = 320  # pixels of a view, about


@dataclass(frozen=True)
class View:
    """A grey image and the depth of its pixels; each pixel covers `step` x `step` pixels of the photograph."""

    grey: np.ndarray  # float32 [h, w]
    depth: np.ndarray  # float64 [h, w], 0 for unknown
    camera: np.ndarray  # float64 [3, 3], in pixels of `grey`
    pose: np.ndarray  # float64 [4, 4]
    step: int


def frame_pairs(scene: Scene, gap: int, most: int) -> list[tuple[int, int]]:
    """At most `most` pairs of frames `gap` apart, spread evenly over the scene."""
    firsts = np.unique(np.linspace(0, len(scene) - 1 - gap, most).round().astype(int))
    return [(int(i), int(i) + gap) for i in firsts]


def reduced_view(scene: Scene, i: int) -> View:
    image = scene.image(i)
    height, width = image.shape[:2]
    step = max(1, round(width / WIDTH))
    rows, columns = height // step, width // step
    cells = image[: rows * step, : columns * step].reshape(rows, step, columns, step, 3)
    grey = cells.mean((1, 3, 4), dtype=np.float32)
    camera = scene.intrinsics(i) / np.array([[step], [step], [1.0]])
    return View(grey, _reduced_depth(scene.depth(i), grey.shape, (height, width), step), camera, scene.pose(i), step)


def _reduced_depth(depth: np.ndarray, shape: tuple[int, ...], image: tuple[int, int], step: int) -> np.ndarray:
    """The nearest known depth within each pixel of the view; of a map that is coarser than the view, its pixel there.

    Depth cameras whose depth was projected into the photograph leave most pixels unknown, but few cells.
    """
    (rows, columns), (height, width) = shape, depth.shape
    if height < rows or width < columns:
        row = ((np.arange(rows) + 0.5) * step * height / image[0]).astype(int)
        column = ((np.arange(columns) + 0.5) * step * width / image[1]).astype(int)
        return depth[row[:, None], column].astype(np.float64)
    first_row = np.ceil(np.arange(rows) * step * height / image[0] - 0.5).astype(int).clip(0)
    first_column = np.ceil(np.arange(columns) * step * width / image[1] - 0.5).astype(int).clip(0)
    nearest = np.minimum.reduceat(np.where(depth > 0, depth, np.inf), first_row, axis=0)
    nearest = np.minimum.reduceat(nearest, first_column, axis=1)
    return np.where(np.isfinite(nearest), nearest, 0.0).astype(np.float64)
