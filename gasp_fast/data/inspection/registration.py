"""Whether a depth map lies on its photograph: outlines of objects in depth are edges in the photograph, too.

Over a few frames, the outlines of the depth maps are laid over the edges of the photographs, moved by up to a few
pixels in every direction. Where outlines and edges meet best is the offset of depth: 0 if depth is registered to
colour. Cameras of depth and colour lie beside each other, so maps that were not registered are off by many pixels.

Nothing is said where few objects stand out from what is behind them, or where their outlines are no edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gasp_fast.data.scenes.scene import Scene

from .views import View, reduced_view

FRAMES = 12
JUMP = 1.15  # ratio of the depths of two neighbouring pixels at an outline
REACH = 14  # pixels of a view in every direction
HOLE = 12  # pixels across which unknown depth is filled
FEWEST_OUTLINES = 1_000  # pixels, over all frames
LEAST_PEAK = 0.05  # mean strength of the edges (0 to 1) at the best offset, above that at a typical one
GROUPS = 3  # of frames, which must show the same offset
SAME = 2.0  # pixels of a view between the offsets of groups that are the same


@dataclass(frozen=True)
class DepthOffset:
    """How far depth has to be moved to lie on the photographs, in their pixels."""

    right: float
    down: float
    width: int  # of the photographs
    gain: float  # what that improves: 0 nothing, 1 as much as the best offset is better than a typical one

    @property
    def share(self) -> float:
        """The distance as a share of the photographs' width."""
        return float(np.hypot(self.right, self.down)) / self.width


@np.errstate(over="ignore", invalid="ignore")
def depth_offset(scene: Scene, frames: Sequence[int]) -> DepthOffset | None:
    """Measured on some of `frames`. None if their depth does not show it clearly."""
    frames = [i for i in frames if scene.frames[i].depth is not None]
    chosen = [frames[k] for k in np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))]
    if len(chosen) < GROUPS:
        return None
    meetings, counts = [], []
    for i in chosen:
        view = reduced_view(scene, i)
        if min(view.grey.shape) <= 4 * REACH:
            return None
        outlines = _outlines(view)
        meetings.append(_meetings(outlines, _edges(view.grey)))
        counts.append(int(outlines.sum()))
    if sum(counts) < FEWEST_OUTLINES:
        return None
    strength = np.sum(meetings, axis=0) / sum(counts)  # [2 R + 1, 2 R + 1]
    best = _best(strength)
    groups = [np.sum(meetings[k::GROUPS], axis=0) for k in range(GROUPS)]
    apart = max(float(np.hypot(*np.subtract(best, _best(group)))) for group in groups)
    peak = strength.max() - np.median(strength)
    if apart > SAME or peak < LEAST_PEAK:
        return None
    gain = float((strength.max() - strength[REACH, REACH]) / peak)
    return DepthOffset(float(best[1] * view.step), float(best[0] * view.step), scene.image_size(chosen[0])[0], gain)


def _best(strength: np.ndarray) -> tuple[int, int]:
    """(down, right) of the strongest place."""
    row, column = np.unravel_index(int(strength.argmax()), strength.shape)
    return int(row) - REACH, int(column) - REACH


def _outlines(view: View) -> np.ndarray:  # float32 [h, w]
    """1 at pixels on both sides of a jump in depth, not within reach of the border."""
    depth = _filled(view.depth)
    marked = np.zeros(depth.shape, np.float32)
    for one, other, first, second in (
        (depth[:-1], depth[1:], marked[:-1], marked[1:]),
        (depth[:, :-1], depth[:, 1:], marked[:, :-1], marked[:, 1:]),
    ):
        jump = (np.minimum(one, other) > 0) & (np.maximum(one, other) > JUMP * np.minimum(one, other))
        first[jump] = second[jump] = 1.0
    inner = np.zeros_like(marked)
    inside = (slice(REACH, -REACH),) * 2
    inner[inside] = marked[inside]
    return inner


def _filled(depth: np.ndarray) -> np.ndarray:
    """Small holes filled with the farther depth of their two sides: behind an outline, the camera sees no depth."""
    across, down = _filled_across(depth), _filled_across(depth.T).T
    return np.where(depth > 0, depth, np.where((across > 0) & (down > 0), np.maximum(across, down), across + down))


def _filled_across(depth: np.ndarray) -> np.ndarray:
    """The farther of the nearest known depths to the left and to the right; 0 unless both are near."""
    width = depth.shape[1]
    column = np.arange(width)
    left = np.maximum.accumulate(np.where(depth > 0, column, -width), axis=1)
    right = np.minimum.accumulate(np.where(depth > 0, column, 2 * width)[:, ::-1], axis=1)[:, ::-1]
    near = (column - left <= HOLE) & (right - column <= HOLE)
    sides = [np.take_along_axis(depth, side.clip(0, width - 1), axis=1) for side in (left, right)]
    return np.where(near, np.maximum(*sides), 0.0)


def _edges(grey: np.ndarray) -> np.ndarray:  # float32 [h, w]
    """The strength of edges, from 0 to 1: a few strong ones must not outweigh all others."""
    strength = np.hypot(*np.gradient(grey))
    edges: np.ndarray = strength / (strength + strength.mean() + 1e-6)
    return edges


def _meetings(outlines: np.ndarray, edges: np.ndarray) -> np.ndarray:  # [2 R + 1, 2 R + 1]
    """The sum of the edges under the outlines, moved by every offset within reach."""
    product = np.fft.rfft2(edges) * np.conj(np.fft.rfft2(outlines))
    sums = np.fft.irfft2(product, edges.shape)
    return np.roll(sums, (REACH, REACH), axis=(0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]
