"""The track recipe of `build.py` in NumPy; `csrc/tracks.cpp` must give the same bits.

Every operation below is one IEEE double operation per point, in a fixed order. A compiled loop that keeps this order
and does not fuse multiply and add gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def track(
    query: np.ndarray,  # float64 [Q, 2], inside image 0
    depth: Sequence[np.ndarray],  # F x float32 [h, w]
    camera: np.ndarray,  # float64 [F, 4]: fx, fy, cx, cy
    motion: np.ndarray,  # float64 [F, 3, 4]: from camera 0 to camera f
    size: np.ndarray,  # float64 [F, 2]: width, height of the colour images
    border: float,
    agreement: float,
    keep: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """query [T, 2], uv [T, F, 2], visible [T, F], depth [T, F] of the kept tracks, most visible first."""
    query, z0 = _known(query, depth[0], size[0])
    x0 = (query[:, 0] - camera[0, 2]) / camera[0, 0] * z0  # [Q]
    y0 = (query[:, 1] - camera[0, 3]) / camera[0, 1] * z0

    count = len(depth)
    u = np.empty((count, len(query)))  # [F, Q]: a frame's values lie together in memory
    v = np.empty_like(u)
    z = np.empty_like(u)
    visible = np.zeros(u.shape, bool)
    u[0], v[0], z[0], visible[0] = query[:, 0], query[:, 1], z0, True
    for f in range(1, count):
        z[f] = ((motion[f, 2, 0] * x0 + motion[f, 2, 1] * y0) + motion[f, 2, 2] * z0) + motion[f, 2, 3]
        x = ((motion[f, 0, 0] * x0 + motion[f, 0, 1] * y0) + motion[f, 0, 2] * z0) + motion[f, 0, 3]
        y = ((motion[f, 1, 0] * x0 + motion[f, 1, 1] * y0) + motion[f, 1, 2] * z0) + motion[f, 1, 3]
        ahead = z[f] > 0
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            u[f] = np.where(ahead, camera[f, 0] * (x / z[f]) + camera[f, 2], -1.0)
            v[f] = np.where(ahead, camera[f, 1] * (y / z[f]) + camera[f, 3], -1.0)
        width, height = size[f]
        within = (u[f] >= border) & (u[f] <= width - border) & (v[f] >= border) & (v[f] <= height - border)
        inside = np.flatnonzero(ahead & within)
        visible[f, inside] = _agrees(u[f, inside], v[f, inside], z[f, inside], depth[f], size[f], agreement)

    order = most_visible(visible, keep)
    uv = np.stack([u[:, order].T, v[:, order].T], axis=-1)
    return query[order], uv, np.ascontiguousarray(visible[:, order].T), np.ascontiguousarray(z[:, order].T)


def _known(query: np.ndarray, depth: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The queries with known depth, and that depth: the map at the pixel that contains the query."""
    height, width = depth.shape
    column = np.minimum(np.floor(query[:, 0] * (width / size[0])).astype(np.int64), width - 1)
    row = np.minimum(np.floor(query[:, 1] * (height / size[1])).astype(np.int64), height - 1)
    z = depth[row, column].astype(np.float64)
    return query[z > 0], z[z > 0]


def _agrees(
    u: np.ndarray, v: np.ndarray, z: np.ndarray, depth: np.ndarray, size: np.ndarray, agreement: float
) -> np.ndarray:
    """Whether z agrees with one of the four depth pixels around (u, v). Pixel centres are at integer + 0.5."""
    height, width = depth.shape
    left = np.floor(u * (width / size[0]) - 0.5).astype(np.int64)
    top = np.floor(v * (height / size[1]) - 0.5).astype(np.int64)
    # A coarser map may end within the border; its outermost pixel then replaces the missing one.
    columns = (np.maximum(left, 0), np.minimum(left + 1, width - 1))
    rows = (np.maximum(top, 0), np.minimum(top + 1, height - 1))
    agrees = np.zeros(u.shape, bool)
    for row in rows:
        for column in columns:
            d = depth[row, column].astype(np.float64)
            agrees |= (d > 0) & (np.abs(z - d) < agreement * np.minimum(z, d))
    return agrees


def most_visible(visible: np.ndarray, keep: float) -> np.ndarray:
    """Indices of the kept tracks of `visible` [F, Q]: the most visible of those seen at least twice; ties by index."""
    seen = visible.sum(axis=0)
    candidates = np.flatnonzero(seen >= 2)
    order = candidates[np.argsort(-seen[candidates].astype(np.int32), kind="stable")]
    return order[: math.ceil(keep * len(order))]
