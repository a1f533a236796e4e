"""Whether the photographs show points where depth and poses project them.

Depth maps agree with each other on a wall or a floor even if a pose is turned by a degree, because the neighbouring
pixels have nearly the same depth. The photographs do not: they show every point a degree away. So one frame's colours
are drawn as the other frame must see them, from depth and poses, and patches of that drawing are looked for in the
photograph. How far away they are found is the displacement: 0 where poses, intrinsics, depth and time stamps are right.

An error that all poses share, such as all cameras turned by the same angle, hardly shows: the motion from frame to
frame stays nearly the same. A single wrong pose shows only if its frame is among those that are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import AGREEMENT

from .views import View, frame_pairs, reduced_view

PAIRS = 5  # of frames, for each gap
PATCH = 15  # pixels of a view along each side
STRIDE = 11  # between patches
REACH = 10  # pixels within which a patch is looked for
FEWEST_PATCHES = 15  # of a pair, and
FEWEST_PAIRS = 3  # of a gap; with less nothing is said
LEAST_VISIBLE = 0.4  # share of a patch that the other frame sees
LEAST_CONTRAST = 4.0  # standard deviation of grey values in a patch
LEAST_SIMILARITY = 0.7  # correlation of a patch and the place where it is found
AMBIGUOUS = 0.01  # places that are less similar by this count as equal: along an edge all are


@dataclass(frozen=True)
class Displacement:
    """How far from its projection a patch is seen in the frame `gap` frames later: the median over pairs of frames."""

    gap: int
    pixels: float  # of the photograph
    degrees: float  # the same, as an angle of the camera
    view_pixels: float  # of the reduced photograph that was searched; a fraction of one is not measured


def displacement(scene: Scene, gap: int) -> Displacement | None:
    """None if the photographs do not show enough: too little texture, overlap or depth."""
    measured = []
    for i, j in frame_pairs(scene, gap, PAIRS):
        if scene.frames[i].depth is None or scene.frames[j].depth is None:
            continue
        view = reduced_view(scene, j)
        distances = patch_distances(reduced_view(scene, i), view)
        if len(distances) >= FEWEST_PATCHES:
            pixels = float(np.median(distances))
            measured.append((pixels * view.step, np.degrees(np.arctan(pixels / view.camera[0, 0])), pixels))
    if len(measured) < FEWEST_PAIRS:
        return None
    return Displacement(gap, *(float(value) for value in np.median(measured, axis=0)))


@np.errstate(all="ignore")  # pixels of a wild depth or camera are found nowhere
def patch_distances(source: View, target: View) -> np.ndarray:  # [n], pixels of the view
    """How far from its place each patch of `target`, drawn with the colours of `source`, is found in `target`."""
    drawn, seen = _drawn(source, target)
    height, width = drawn.shape
    if min(height, width) <= PATCH + 2 * REACH:
        return np.zeros(0)
    top, left = np.mgrid[REACH : height - PATCH - REACH : STRIDE, REACH : width - PATCH - REACH : STRIDE]
    top, left = top.ravel(), left.ravel()
    patch = sliding_window_view(drawn, (PATCH, PATCH))[top, left]  # [n, P, P]
    weight = sliding_window_view(seen, (PATCH, PATCH))[top, left].astype(np.float32)
    count = weight.sum((1, 2), keepdims=True).clip(1)
    patch = (patch - (patch * weight).sum((1, 2), keepdims=True) / count) * weight
    contrast = np.sqrt((patch**2).sum((1, 2)) / count[:, 0, 0])
    usable = (weight.mean((1, 2)) > LEAST_VISIBLE) & (contrast > LEAST_CONTRAST)
    around = sliding_window_view(target.grey, (PATCH + 2 * REACH,) * 2)[top[usable] - REACH, left[usable] - REACH]
    similarity = _correlations(patch[usable], weight[usable], around)  # [n, 2 R + 1, 2 R + 1]
    offset = np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1])
    best = similarity.max((1, 2), initial=-1.0)
    as_good = similarity >= (best - AMBIGUOUS)[:, None, None]
    distances: np.ndarray = np.where(as_good, offset, np.inf).min((1, 2), initial=np.inf)
    return distances[best > LEAST_SIMILARITY]


def _drawn(source: View, target: View) -> tuple[np.ndarray, np.ndarray]:
    """The grey values of `source` at the points that `target` sees, and where `source` sees them, both [h, w]."""
    height, width = target.grey.shape
    row, column = np.mgrid[:height, :width] + 0.5
    camera = target.camera
    rays = np.stack([(column - camera[0, 2]) / camera[0, 0], (row - camera[1, 2]) / camera[1, 1], np.ones_like(row)])
    motion = source.pose @ np.linalg.inv(target.pose)
    x, y, z = np.einsum("ij,jhw->ihw", motion[:3, :3], rays * target.depth) + motion[:3, 3:, None]
    seen = (target.depth > 0) & (z > 1e-9)
    z = np.where(seen, z, 1.0)
    # Indices of pixels, whose centres are at integer + 0.5.
    u = source.camera[0, 0] * x / z + source.camera[0, 2] - 0.5
    v = source.camera[1, 1] * y / z + source.camera[1, 2] - 0.5
    rows, columns = source.grey.shape
    seen &= (u >= 0) & (u < columns - 1) & (v >= 0) & (v < rows - 1)
    u, v = np.where(seen, u, 0.0), np.where(seen, v, 0.0)
    there = source.depth[np.rint(v).astype(int), np.rint(u).astype(int)]
    seen &= (there > 0) & (np.abs(there - z) < AGREEMENT * np.minimum(there, z))
    left, top = u.astype(int), v.astype(int)
    right_share, lower_share, grey = u - left, v - top, source.grey
    upper = grey[top, left] * (1 - right_share) + grey[top, left + 1] * right_share
    lower = grey[top + 1, left] * (1 - right_share) + grey[top + 1, left + 1] * right_share
    return upper * (1 - lower_share) + lower * lower_share, seen


def _correlations(patch: np.ndarray, weight: np.ndarray, around: np.ndarray) -> np.ndarray:  # [n, 2 R + 1, 2 R + 1]
    """Correlation of each patch (mean 0 under its weight) with every place in the larger patch around it."""
    size = around.shape[1:]
    places = slice(0, 2 * REACH + 1)

    def sums(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        product = np.fft.rfft2(image) * np.conj(np.fft.rfft2(kernel, size))
        return np.fft.irfft2(product, size)[:, places, places]

    around = around - around.mean((1, 2), keepdims=True)
    count = weight.sum((1, 2))[:, None, None]
    variance = sums(around**2, weight) - sums(around, weight) ** 2 / count  # times count
    power = (patch**2).sum((1, 2))[:, None, None]
    return sums(around, patch) / np.sqrt(variance.clip(LEAST_CONTRAST) * power)
