"""Builds point tracks from depth: follows points of one frame through the other frames.

This is the recipe of GASP's appendix A and of VGGT. Query points of the first frame, on a grid of cell centres or on
every pixel, are unprojected with that frame's depth and projected into every other frame. A point is visible in a frame
if its projection lies at least `BORDER` pixels inside the image and its depth z agrees with the frame's depth map D at
one of the four pixels around it: |z − D| < `AGREEMENT` of the smaller. Tracks visible in a single frame are dropped; of
the others the half that is visible most often is kept.

`reference.py` is the recipe in NumPy; `csrc/tracks.cpp` is the same arithmetic in the same order, with threads, and
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from gasp_fast.data.compiled import Backend, tracks_extension
from gasp_fast.data.scenes.scene import Scene, rigid_inverse

from . import reference

Order = Literal["anchor_first", "chronological"]  # of a sequence's frames, as the model sees them
BORDER = 4.0  # pixels; closer to the image's edge a point counts as not visible
LARGEST_GRID = 1024  # query points along an axis
AGREEMENT = 0.05  # largest relative difference between two depths of one surface


@dataclass(frozen=True)
class Tracks:
    """`T` points in `F` frames, most visible first. Annotations are read as float32."""

    frames: np.ndarray  # int64 [F], indices into the scene
    query: np.ndarray  # float64 [T, 2], pixels of the query frame, x then y
    uv: np.ndarray  # float64 [T, F, 2], pixels of the colour image; (-1, -1) behind the camera
    visible: np.ndarray  # bool [T, F]
    depth: np.ndarray  # float64 [T, F], projected depth of the point in each frame's camera
    query_frame: int = 0  # its place among the `F`

    def __len__(self) -> int:
        return len(self.query)

    def in_temporal_order(self) -> Tracks:
        """The same tracks, with the frames sorted as in the scene."""
        order = np.argsort(self.frames)
        return replace(
            self,
            frames=self.frames[order],
            uv=self.uv[:, order],
            visible=self.visible[:, order],
            depth=self.depth[:, order],
            query_frame=int(np.flatnonzero(order == self.query_frame)[0]),
        )


@dataclass(frozen=True)
class Views:
    """Depth maps and cameras of the frames."""

    depth: Sequence[np.ndarray]  # F maps, float32 [h, w], 0: unknown
    intrinsics: np.ndarray  # float64 [F, 3, 3], in pixels of the colour images
    pose: np.ndarray  # float64 [F, 4, 4], world-to-camera
    size: np.ndarray  # int64 [F, 2], (width, height) of the colour images
    frames: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [F], as in `Tracks`

    def __post_init__(self) -> None:
        count = len(self.depth)
        for name, array, shape in (
            ("intrinsics", self.intrinsics, (count, 3, 3)),
            ("pose", self.pose, (count, 4, 4)),
            ("size", self.size, (count, 2)),
        ):
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}; {count} depth maps need {shape}")
        if count < 1:
            raise ValueError("depth is empty; tracks need at least one frame")

    def motions(self) -> np.ndarray:  # float64 [F, 3, 4]
        """Rigid motion from the camera of frame 0 to the camera of each frame."""
        return (self.pose @ rigid_inverse(self.pose[0]))[:, :3]

    def cameras(self) -> np.ndarray:  # float64 [F, 4]: fx, fy, cx, cy
        return np.stack([self.intrinsics[:, r, c] for r, c in ((0, 0), (1, 1), (0, 2), (1, 2))], axis=1)


def build_tracks(
    scene: Scene,
    frames: Sequence[int],
    grid: int | Literal["dense"] = 8,
    keep: float = 0.5,
    *,
    threads: int = 1,
    backend: Backend = "auto",
) -> Tracks:
    """Tracks of `scene` through `frames`; `frames[0]` is the query frame.

    `grid` is the number of query points along each axis of the query frame, or "dense" for each of its pixels; `keep`
    is the share of the tracks to keep, by visibility.
    """
    if threads > 1:
        scene.read_ahead([int(i) for i in frames], images=False, threads=threads)
    views = load_views(scene, frames)
    return track_points(grid_queries(views, grid), views, keep, threads=threads, backend=backend)


def load_views(scene: Scene, frames: Sequence[int]) -> Views:
    """Depth maps and cameras of `frames`, decoded or taken from the process's cache."""
    indices = np.asarray(frames, dtype=np.int64)
    if indices.ndim != 1 or not len(indices):
        raise ValueError(f"frames = {frames!r}; give at least one frame index")
    return Views(
        depth=[scene.depth(int(i)) for i in indices],
        intrinsics=np.stack([scene.intrinsics(int(i)) for i in indices]),
        pose=np.stack([scene.pose(int(i)) for i in indices]),
        size=np.array([scene.image_size(int(i)) for i in indices], np.int64),
        frames=indices,
    )


def grid_queries(views: Views, grid: int | Literal["dense"]) -> np.ndarray:  # float64 [Q, 2]
    """Cell centres of a `grid` x `grid` grid over the first image, row by row; "dense": all pixel centres."""
    width, height = (int(n) for n in views.size[0])
    if grid == "dense":
        columns, rows = width, height
    elif isinstance(grid, int | np.integer) and not isinstance(grid, bool) and 1 <= grid <= LARGEST_GRID:
        columns = rows = int(grid)
    else:
        raise ValueError(f'grid = {grid!r}; it is a number of points per axis, 1 to {LARGEST_GRID}, or "dense"')
    x = (np.arange(columns) + 0.5) * (width / columns)
    y = (np.arange(rows) + 0.5) * (height / rows)
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1).reshape(-1, 2)


def track_points(
    query: np.ndarray, views: Views, keep: float = 0.5, *, threads: int = 1, backend: Backend = "auto"
) -> Tracks:
    """Tracks of the points `query` [Q, 2] of the first view, without those of unknown depth there."""
    query = np.ascontiguousarray(query, dtype=np.float64)
    if query.ndim != 2 or query.shape[1] != 2:
        raise ValueError(f"query has shape {query.shape}; it is [points, 2], x then y")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep = {keep!r}; it is the share of tracks to keep, above 0 and at most 1")
    if threads < 1:
        raise ValueError(f"threads = {threads}; at least 1")
    outside = ~((query >= 0) & (query < views.size[0])).all(axis=1)
    if outside.any():
        where = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"query[{where}] = {query[where].tolist()} is outside the first image, {views.size[0].tolist()}"
        )

    depth = [np.ascontiguousarray(one, dtype=np.float32) for one in views.depth]
    arguments = (query, depth, views.cameras(), views.motions(), views.size.astype(np.float64), BORDER, AGREEMENT)
    extension = tracks_extension(backend)
    if extension is not None:
        query, uv, visible, point_depth = extension.track(*arguments, keep, threads)
    else:
        query, uv, visible, point_depth = reference.track(*arguments, keep)
    return Tracks(views.frames, query, uv, visible, point_depth)
