"""Removes lens distortion: from the OpenCV model `k1, k2, p1, p2` to the pinhole camera with the same intrinsics.

A pixel of the pinhole image sees the ray (x, y, 1). The lens bends that ray to (x', y'):

    r² = x² + y²,   g = 1 + k1 r² + k2 r⁴
    x' = x g + 2 p1 x y + p2 (r² + 2 x²)
    y' = y g + p1 (r² + 2 y²) + 2 p2 x y

Undistorting needs only this forward map: each pixel takes the photograph's colour at the bent ray. No inverse, no
iteration.
"""

from __future__ import annotations

import functools

import numpy as np

Distortion = tuple[float, float, float, float]  # k1, k2, p1, p2
NO_DISTORTION: Distortion = (0.0, 0.0, 0.0, 0.0)


def distort(x: np.ndarray, y: np.ndarray, distortion: Distortion) -> tuple[np.ndarray, np.ndarray]:
    """Image-plane coordinates of the rays (x, y, 1) behind the lens."""
    k1, k2, p1, p2 = distortion
    squared = x * x + y * y
    gain = 1 + squared * (k1 + squared * k2)
    return (
        x * gain + 2 * p1 * x * y + p2 * (squared + 2 * x * x),
        y * gain + p1 * (squared + 2 * y * y) + 2 * p2 * x * y,
    )


def undistort(pixels: np.ndarray, intrinsics: np.ndarray, distortion: Distortion, smooth: bool) -> np.ndarray:
    """The pinhole image of the same size; 0 where the photograph shows nothing.

    `smooth` interpolates between the four nearest pixels (for colour). Otherwise the nearest pixel is taken (for
    depth: the mean of two surfaces is a depth where nothing is).
    """
    u, v = _source_map(pixels.shape[1], pixels.shape[0], tuple(intrinsics.ravel()), distortion)  # [H, W] pixel indices
    height, width = pixels.shape[:2]
    seen = (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)
    if not smooth:
        column = np.clip(np.rint(u), 0, width - 1).astype(np.intp)
        row = np.clip(np.rint(v), 0, height - 1).astype(np.intp)
        return np.where(seen, pixels[row, column], 0).astype(pixels.dtype)

    u, v = np.clip(u, 0, width - 1), np.clip(v, 0, height - 1)
    left, top = np.minimum(u.astype(np.intp), width - 2), np.minimum(v.astype(np.intp), height - 2)
    right_share, lower_share = (u - left)[..., None], (v - top)[..., None]
    upper = pixels[top, left] * (1 - right_share) + pixels[top, left + 1] * right_share
    lower = pixels[top + 1, left] * (1 - right_share) + pixels[top + 1, left + 1] * right_share
    blended = upper * (1 - lower_share) + lower * lower_share
    return np.where(seen[..., None], np.rint(blended), 0).astype(pixels.dtype)


@functools.lru_cache(maxsize=4)  # the frames of a scene share one camera
def _source_map(
    width: int, height: int, matrix: tuple[float, ...], distortion: Distortion
) -> tuple[np.ndarray, np.ndarray]:
    """Column and row in the photograph, each float32 [H, W], of every pixel of the pinhole image."""
    fx, cx, fy, cy = matrix[0], matrix[2], matrix[4], matrix[5]
    x = (np.arange(width) + 0.5 - cx) / fx
    y = (np.arange(height) + 0.5 - cy) / fy
    bent_x, bent_y = distort(x[None, :], y[:, None], distortion)
    return (bent_x * fx + cx - 0.5).astype(np.float32), (bent_y * fy + cy - 0.5).astype(np.float32)
