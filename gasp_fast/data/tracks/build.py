"""Point tracks from depth: where the points seen in one frame are seen again in the others.

The recipe (GASP, App. A; VGGT before it). Query points of the first frame, on a grid of cell centres or on every
pixel, are lifted into space by that frame's depth and projected into every other frame. A point is visible in a frame
if its projection lies well inside the image and the frame's own depth map, at one of the four pixels around it, says
the same depth: |z − D| < 5 % of the smaller. Tracks seen in one frame only are dropped, and of the rest the half that
is seen most often is kept.

`tracks_reference.py` is that text in NumPy; `csrc/tracks.cpp` is the same arithmetic, same order, same bits, threaded.
Knows arrays and scenes, no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gasp_fast.data.scenes.scene import Scene, rigid_inverse

from . import reference as tracks_reference

BORDER = 4.0  # pixels; a projection closer to the image's edge is not trusted
AGREEMENT = 0.05  # largest relative difference of two depths of one surface
Backend = Literal["auto", "cpp", "numpy"]


@dataclass(frozen=True)
class Tracks:
    """`T` points through `F` frames, most visible first. Frame 0 is the frame of the queries."""

    frames: np.ndarray  # int64 [F], indices into the scene
    query: np.ndarray  # float64 [T, 2], pixels of frame 0, x then y
    uv: np.ndarray  # float64 [T, F, 2], pixels of the colour image; (-1, -1) behind the camera
    visible: np.ndarray  # bool [T, F]
    depth: np.ndarray  # float64 [T, F], the depth of the point itself in each frame's camera
    negative_uv: np.ndarray | None = None  # float64 [T, F, 2], places that are surely wrong; NaN where none was found

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True)
class Views:
    """The frames as arrays: what the recipe needs and nothing else."""

    depth: Sequence[np.ndarray]  # F maps, float32 [h, w], 0 unknown
    intrinsics: np.ndarray  # float64 [F, 3, 3], in pixels of the colour images
    pose: np.ndarray  # float64 [F, 4, 4], world-to-camera
    size: np.ndarray  # int64 [F, 2], (width, height) of the colour images
    frames: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

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
        """From the camera of frame 0 to the camera of each frame."""
        return (self.pose @ rigid_inverse(self.pose[0]))[:, :3]

    def cameras(self) -> np.ndarray:  # float64 [F, 4]: fx, fy, cx, cy
        return np.stack([self.intrinsics[:, r, c] for r, c in ((0, 0), (1, 1), (0, 2), (1, 2))], axis=1)


def build_tracks(
    scene: Scene,
    frames: Sequence[int],
    grid: int | Literal["dense"] = 8,
    keep: float = 0.5,
    *,
    negatives: bool = False,
    seed: int = 0,
    threads: int = 1,
    backend: Backend = "auto",
) -> Tracks:
    """Tracks of `scene` through `frames`, starting in `frames[0]`.

    `grid` is the number of query points along each axis of the first frame, or "dense" for each of its pixels;
    `keep` the share of the tracks to keep, by visibility. `negatives` adds one surely wrong place per track and frame,
    drawn with `seed`.
    """
    if threads > 1:
        scene.read_ahead([int(i) for i in frames], images=False, threads=threads)
    views = views_of(scene, frames)
    tracks = track_points(grid_queries(views, grid), views, keep, threads=threads, backend=backend)
    return with_negatives(tracks, views, seed) if negatives else tracks


def views_of(scene: Scene, frames: Sequence[int]) -> Views:
    """The arrays of `frames`, decoded (or taken from the process's store of decoded frames)."""
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
    """Cell centres of a `grid` x `grid` grid over the first image, row by row; "dense": its pixel centres."""
    width, height = (int(n) for n in views.size[0])
    if grid == "dense":
        columns, rows = width, height
    elif isinstance(grid, int | np.integer) and not isinstance(grid, bool) and grid >= 1:
        columns = rows = int(grid)
    else:
        raise ValueError(f'grid = {grid!r}; it is a number of points per axis, at least 1, or "dense"')
    x = (np.arange(columns) + 0.5) * (width / columns)
    y = (np.arange(rows) + 0.5) * (height / rows)
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1).reshape(-1, 2)


def track_points(
    query: np.ndarray, views: Views, keep: float = 0.5, *, threads: int = 1, backend: Backend = "auto"
) -> Tracks:
    """Tracks of the points `query` [Q, 2] of the first view; those without known depth there are left out."""
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
    if use_cpp(backend):
        from gasp_fast import _tracks

        query, uv, visible, point_depth = _tracks.track(*arguments, keep, threads)
    else:
        query, uv, visible, point_depth = tracks_reference.track(*arguments, keep)
    return Tracks(views.frames, query, uv, visible, point_depth)


def use_cpp(backend: Backend) -> bool:
    """Whether the compiled twin answers; "auto" falls back to NumPy where it is not built."""
    if backend not in ("auto", "cpp", "numpy"):
        raise ValueError(f'backend = {backend!r}; known are "auto", "cpp" and "numpy"')
    if backend == "numpy":
        return False
    try:
        from gasp_fast import _tracks  # noqa: F401
    except ImportError:
        if backend == "cpp":
            raise ValueError('backend = "cpp": gasp_fast._tracks is not built; run: pip install -e .') from None
        return False
    return True


# ---- negatives ------------------------------------------------------------------------------------------------------

NEGATIVE_REACH = 0.5  # of the image's size: how far a negative may lie from the true place
NEGATIVE_DISTANCE = 16.0  # pixels from the epipolar line: nearer ones could pass for true to a purely geometric eye
NEGATIVE_TRIES = 4


def with_negatives(tracks: Tracks, views: Views, seed: int = 0) -> Tracks:
    """`tracks` with one wrong place for each point in each other frame (VGGT's perturbation).

    The true place is moved by a uniform offset of up to half the image; the move is kept if it ends inside the image
    and further than 16 px (Sampson distance) from the epipolar line of the query. A few tries each, then NaN. Frame 0
    has none. A camera that does not move has no epipolar line: there the distance to the true place counts.
    """
    draw = np.random.default_rng(seed)
    negative = np.full(tracks.uv.shape, np.nan)  # [T, F, 2]
    fundamental = _fundamental_matrices(views)
    for f in range(1, len(views.depth)):
        size = views.size[f].astype(np.float64)
        for _ in range(NEGATIVE_TRIES):
            moved = tracks.uv[:, f] + draw.uniform(-NEGATIVE_REACH, NEGATIVE_REACH, (len(tracks), 2)) * size
            matrix = fundamental[f]
            if matrix is None:
                distance = np.linalg.norm(moved - tracks.uv[:, f], axis=1)
            else:
                distance = sampson_distance(matrix, tracks.query, moved)
            wrong = ((moved >= 0) & (moved < size)).all(axis=1) & (distance > NEGATIVE_DISTANCE)
            wrong &= (tracks.depth[:, f] > 0) & np.isnan(negative[:, f, 0])
            negative[wrong, f] = moved[wrong]
    return Tracks(tracks.frames, tracks.query, tracks.uv, tracks.visible, tracks.depth, negative)


def sampson_distance(fundamental: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:  # [T]
    """Distance in pixels, to first order, from fulfilling `second^T F first = 0`."""
    a = np.concatenate([first, np.ones((len(first), 1))], axis=1) @ fundamental.T  # lines in the second image
    b = np.concatenate([second, np.ones((len(second), 1))], axis=1) @ fundamental  # lines in the first image
    residual = (a[:, :2] * second).sum(1) + a[:, 2]
    slope = np.sqrt((a[:, :2] ** 2).sum(1) + (b[:, :2] ** 2).sum(1))
    return np.abs(residual) / np.maximum(slope, 1e-300)


def _fundamental_matrices(views: Views) -> list[np.ndarray | None]:
    """From frame 0 to each frame, `K_f^-T [t]x R K_0^-1`; None where the two cameras stand at one place."""
    inverse = np.linalg.inv(views.intrinsics)
    matrices: list[np.ndarray | None] = []
    for f, motion in enumerate(views.motions()):
        x, y, z = motion[:, 3]
        if math.hypot(x, y, z) < 1e-9:
            matrices.append(None)
        else:
            cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            matrices.append(inverse[f].T @ cross @ motion[:, :3] @ inverse[0])
    return matrices
