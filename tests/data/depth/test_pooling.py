"""A patch's depth is the mean of its known pixels, and both implementations give the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.random_views import random_views

from gasp_fast.data.depth.pooling import pool_depth

pytest.importorskip("gasp_fast._tracks", reason="the extension is not built: pip install -e .")

BACKENDS = pytest.mark.parametrize("backend", ["numpy", "cpp"])


def pooled_by_hand(depth, size, x_edges, y_edges):
    height, width = depth.shape
    result = np.zeros((len(y_edges) - 1, len(x_edges) - 1), np.float32)
    for r in range(result.shape[0]):
        for c in range(result.shape[1]):
            x = (np.arange(width) + 0.5) * size[0] / width
            y = (np.arange(height) + 0.5) * size[1] / height
            across = (x >= x_edges[c]) & (x < x_edges[c + 1])
            down = (y >= y_edges[r]) & (y < y_edges[r + 1])
            inside = depth[np.ix_(down, across)].ravel().tolist()
            known = [d for d in inside if d > 0 and math.isfinite(d)]
            result[r, c] = np.float32(math.fsum(known) / len(known)) if known else 0
    return result


@BACKENDS
@pytest.mark.parametrize("seed", range(6))
def test_patch_depth_is_the_mean_of_the_known_pixels(backend, seed):
    views = random_views(seed)
    views.depth[1][::3, ::2] = np.nan
    views.depth[2][::2] = np.inf
    views.depth[3][:] = 0
    width, height = (int(n) for n in views.size.min(axis=0))
    x_edges, y_edges = np.linspace(2.25, width - 3.25, 8), np.linspace(0, height, 5)
    ours = pool_depth(views.depth, views.size, x_edges, y_edges, backend=backend, threads=2)
    assert ours.dtype == np.float32 and ours.shape == (5, 4, 7)
    assert not ours[3].any()
    for f, (depth, size) in enumerate(zip(views.depth, views.size, strict=True)):
        np.testing.assert_allclose(ours[f], pooled_by_hand(depth, size, x_edges, y_edges), rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_compiled_and_reference_patch_depth_are_equal_to_the_last_bit(seed):
    draw = np.random.default_rng(seed)
    depth = [np.exp(draw.uniform(-4, 5, (draw.integers(40, 99), 90))).astype(np.float32) for _ in range(4)]
    for one in depth:
        one[draw.random(one.shape) < 0.3] = 0
    size = [(180, 150)] * 4
    edges = (np.linspace(0, 180, 35), np.linspace(0, 150, 20))
    ours, theirs = (pool_depth(depth, size, *edges, backend=backend) for backend in ("cpp", "numpy"))
    assert ours.tobytes() == theirs.tobytes()


@BACKENDS
def test_patches_thinner_than_a_pixel_are_unknown_or_whole(backend):
    depth = [np.arange(1, 7, dtype=np.float32).reshape(2, 3)]
    pooled = pool_depth(depth, [(3, 2)], np.linspace(0, 3, 7), np.linspace(0, 2, 5), backend=backend)[0]
    assert pooled.tolist() == [[0] * 6, [0, 1, 0, 2, 0, 3], [0] * 6, [0, 4, 0, 5, 0, 6]]


@BACKENDS
def test_edges_beyond_the_image_are_cut_off(backend):
    depth = [np.full((4, 4), 3.0, np.float32)]
    pooled = pool_depth(depth, [(4, 4)], np.array([-4.0, 0.0, 4.0, 9.0]), np.array([0.0, 4.0]), backend=backend)
    assert pooled[0].tolist() == [[0.0, 3.0, 0.0]]


@pytest.mark.parametrize("edges", [[3.0, 1.0], [1.0], [[0.0, 1.0]], [0.0, np.nan]])
def test_bad_edges_are_named(edges):
    with pytest.raises(ValueError, match="x_edges = "):
        pool_depth([np.ones((4, 4), np.float32)], [(4, 4)], np.array(edges), np.array([0.0, 4.0]))
