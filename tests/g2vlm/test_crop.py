"""A crop moves pixels, the image, depth and the camera together."""

from __future__ import annotations

import numpy as np
import pytest
from support.box_world import CAMERA, BoxWorld

from gasp_fast.g2vlm.crop import Crop, unprojected

SIZES = [(56, 84), (84, 56), (14, 210), (224, 392)]  # height, width: smaller, upright, a strip, larger


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [(0.0, 0.0), (-1.0, 0.37), (1.0, 1.0)])
def test_a_point_is_seen_at_the_moved_pixel(size, shift):
    crop, rng = Crop.largest((360, 216), *size, shift), np.random.default_rng(0)
    points = rng.uniform([-2, -1, 1], [2, 1, 6], (500, 3))
    seen = points @ CAMERA.T
    moved = points @ crop.intrinsics(CAMERA).T
    np.testing.assert_allclose(moved[:, :2] / moved[:, 2:], crop.pixels(seen[:, :2] / seen[:, 2:]), atol=1e-6)
    corners = crop.pixels(np.array([[0.0, 0.0], [360.0, 216.0]]))
    assert (corners[0] < 1e-9).all() and (corners[1] > np.array(size)[::-1] - 1e-9).all()  # nothing outside is shown
    assert min(corners[1] - corners[0] - np.array(size)[::-1]) == pytest.approx(0)  # and no larger part fits


def test_an_odd_factor_keeps_the_points_of_its_middle_pixels():
    """Each new pixel has its centre on that of an old one, so image and depth give the same points exactly."""
    world, step = BoxWorld(), 3
    depth = world.depth(2).astype(np.float32)
    crop = Crop((360, 216), 6.0, 9.0, float(step), 56, 84)
    cropped = unprojected(crop.depth(depth), crop.intrinsics(CAMERA))
    old = unprojected(depth, CAMERA)[9 + 1 :: step, 6 + 1 :: step][:56, :84]
    np.testing.assert_allclose(cropped, old, rtol=1e-12, atol=1e-12)


def test_depth_is_never_blended_and_may_be_coarser_than_the_photograph():
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 5, (108, 180)).astype(np.float32)  # half the resolution of the photograph
    crop = Crop.largest((360, 216), 56, 84, (0.3, 0.0))
    taken = crop.depth(values)
    assert np.isin(taken, values).all()
    for row, column in [(0, 0), (13, 71), (55, 83)]:
        u, v = crop.left + (column + 0.5) * crop.step, crop.top + (row + 0.5) * crop.step
        assert taken[row, column] == values[int(v / 2), int(u / 2)]


def test_the_image_moves_as_the_pixels_do():
    """A photograph whose colours are its own coordinates shows the coordinates that the crop takes."""
    columns, rows = np.meshgrid(np.arange(180) + 0.5, np.arange(108) + 0.5)
    photograph = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    crop = Crop.largest((180, 108), 42, 28, (0.4, 0.0))
    expected = np.stack(np.meshgrid(np.arange(28) + 0.5, np.arange(42) + 0.5), -1) * crop.step + [crop.left, crop.top]
    shown = crop.image(photograph)[2:-2, 2:-2, :2] + 0.5  # colours are rounded down
    np.testing.assert_allclose(shown, expected[2:-2, 2:-2], atol=0.51)
    thin = np.zeros((108, 180, 3), np.uint8)
    thin[::2] = 200  # lines that antialiasing turns to grey
    assert np.abs(crop.image(thin)[5:-5].astype(int) - 100).max() < 45
