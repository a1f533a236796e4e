"""Fits the scale and shift of a monocular depth map to the sparse points of its frame, robustly.

A monocular model predicts depth (or inverse depth) up to a factor and an offset. COLMAP's points have the scene's
scale, at a few hundred pixels, some of them wrong. With x the prediction and y the truth (z, or 1/z), the fit finds
a and b that minimise the relative error |a x + b − y| / y. To first order it is the relative error of the depth, in
both spaces.

1. Least median of squares: each of many pairs of points gives a line; the line with the smallest median error is
   taken. Nearly half of the points may be wrong. The pairs come from a fixed seed, so the fit is reproducible.
2. Least squares over the points within three (robust) standard deviations of that line, repeated until it converges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Space = Literal["depth", "inverse depth"]
SPACES: tuple[Space, ...] = ("depth", "inverse depth")

PAIRS = 400
ROUNDS = 10
NORMAL = 1.4826  # from the median of |error| to the standard deviation of a normal error
# A frame outside these bounds is unusable.
FEWEST_POINTS = 30
LARGEST_ERROR = 0.10
FEWEST_INLIERS = 0.5  # of the points, within LARGEST_ERROR
# In front of a flat wall any prediction fits with a scale near 0. So a fit must halve the error of the best constant
# depth, unless its error is below this.
GOOD_ERROR = 0.02
# A fitted depth beyond the range of the sparse points by more than this factor is unknown.
REACH = 2.0


@dataclass(frozen=True)
class Alignment:
    """`z = scale * x + shift`, or `1 / z = scale * x + shift`, and its error."""

    space: Space
    scale: float
    shift: float
    error: float  # median of |z_fitted - z| / z over all points given
    inliers: float  # share of the points within LARGEST_ERROR
    points: int
    nearest: float  # depth range of the points
    farthest: float
    constant_error: float  # median error of the best constant depth

    @property
    def fault(self) -> str | None:
        """Why the frame is unusable, or None."""
        if self.points < FEWEST_POINTS:
            return f"{self.points} sparse points; {FEWEST_POINTS} are needed"
        if self.scale <= 0:
            return "prediction and sparse points are negatively correlated"
        if self.error > LARGEST_ERROR or self.inliers < FEWEST_INLIERS:
            return f"median error {self.error:.3f}, {self.inliers:.0%} of the points within {LARGEST_ERROR:.0%}"
        if self.error > max(GOOD_ERROR, 0.5 * self.constant_error):
            return f"median error {self.error:.3f}, hardly below the {self.constant_error:.3f} of a constant depth"
        return None

    def apply(self, predicted: np.ndarray) -> np.ndarray:  # float32 [h, w]
        """Depth in the scene's unit; 0 where it lies outside the range of the points by more than `REACH`."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = self.scale * predicted.astype(np.float64) + self.shift
            depth = value if self.space == "depth" else 1.0 / value
        trusted = (depth >= self.nearest / REACH) & (depth <= self.farthest * REACH)
        return np.where(trusted, depth, 0.0).astype(np.float32)


def align(predicted: np.ndarray, depth: np.ndarray, space: Space) -> Alignment:
    """Fits predictions [n] to the depths [n] of the same pixels. Bad points raise no error: see `fault`."""
    if predicted.shape != depth.shape or predicted.ndim != 1:
        raise ValueError(f"predicted has shape {predicted.shape} and depth {depth.shape}; both are [points]")
    good = np.isfinite(predicted) & np.isfinite(depth) & (depth > 0)
    x, z = predicted[good].astype(np.float64), depth[good].astype(np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return Alignment(space, 0.0, 0.0, np.inf, 0.0, len(x), 0.0, 0.0, np.inf)
    y = z if space == "depth" else 1.0 / z
    scale, shift = _least_squares(x, y, *_least_median(x, y))

    fitted = scale * x + shift
    with np.errstate(divide="ignore"):
        fitted = fitted if space == "depth" else 1.0 / fitted
    relative = np.where(np.isfinite(fitted) & (fitted > 0), np.abs(fitted - z) / z, np.inf)
    near, far = (float(n) for n in np.percentile(z, [1, 99]))
    within = float((relative <= LARGEST_ERROR).mean())
    constant = float(np.median(np.abs(np.median(z) - z) / z))
    return Alignment(space, scale, shift, float(np.median(relative)), within, len(x), near, far, constant)


def _least_median(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Scale and shift of the line through two points with the smallest median relative error."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(len(x), size=(2, PAIRS))
    apart = x[first] != x[second]
    if not apart.any():  # nearly constant predictions: take the smallest and the largest
        first, second, apart = np.array([x.argmin()]), np.array([x.argmax()]), np.array([True])
    first, second = first[apart], second[apart]
    scales = (y[second] - y[first]) / (x[second] - x[first])
    shifts = y[first] - scales * x[first]
    errors = np.median(np.abs(scales[:, None] * x + shifts[:, None] - y) / y, axis=1)  # [pairs]
    # A falling line is always wrong; it is taken only if there is no rising one.
    best = int(np.lexsort((errors, scales <= 0))[0])
    return float(scales[best]), float(shifts[best])


def _least_squares(x: np.ndarray, y: np.ndarray, scale: float, shift: float) -> tuple[float, float]:
    """Scale and shift refined by least squares over the points near the line, repeatedly."""
    columns = np.stack([x, np.ones_like(x)], axis=1) / y[:, None]  # [n, 2], rows divided by y: relative errors
    for _ in range(ROUNDS):
        errors = np.abs(columns @ (scale, shift) - 1.0)
        near = errors <= max(3 * NORMAL * float(np.median(errors)), 1e-6)
        if near.sum() < 2 or np.ptp(x[near]) == 0:
            break
        (new_scale, new_shift), *_ = np.linalg.lstsq(columns[near], np.ones(int(near.sum())), rcond=None)
        converged = np.isclose(new_scale, scale, rtol=1e-9) and np.isclose(new_shift, shift, rtol=1e-9, atol=1e-12)
        scale, shift = float(new_scale), float(new_shift)
        if converged:
            break
    return scale, shift
