"""Pictures of depth and cameras, by what is in their axes."""

import numpy as np
import pytest

from gasp_fast.drawing import save_figure
from gasp_fast.g2vlm.pictures import draw_cameras, draw_depths

FRAMES, HEIGHT, WIDTH = 7, 6, 9


def test_a_picture_of_depth_has_both_in_the_same_colours_and_grey_where_nothing_is_known(tmp_path):
    draw = np.random.default_rng(0)
    true = 1 + draw.random((FRAMES, HEIGHT, WIDTH))
    valid = draw.random(true.shape) < 0.8
    figure = draw_depths(np.zeros((*true.shape, 3), np.uint8), 1.1 * true, np.where(valid, true, 5), valid, "x")
    panels = [[axis.images[0] for axis in figure.axes[row * 5 : row * 5 + 5]] for row in range(4)]
    for (_, truth, ours, error), frame in zip(zip(*panels, strict=True), (0, 2, 3, 4, 6), strict=True):
        assert truth.norm is ours.norm
        assert (truth.get_array().mask == ~valid[frame]).all() and (error.get_array().mask == ~valid[frame]).all()
        np.testing.assert_allclose(truth.get_array().compressed(), true[frame][valid[frame]])
        np.testing.assert_allclose(error.get_array().compressed(), 0.1)
        assert (ours.get_array() == 1.1 * true[frame]).all()
    assert "mean 0.100" in figure.axes[15].texts[0].get_text()
    assert save_figure(figure, tmp_path / "depth.png").stat().st_size > 10_000


def test_a_frame_without_known_depth_is_drawn(tmp_path):
    nothing = np.zeros((1, HEIGHT, WIDTH))
    figure = draw_depths(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), nothing + 1, nothing, nothing > 0)
    assert save_figure(figure, tmp_path / "depth.png").is_file()


def test_cameras_are_at_their_places_and_look_along_their_z_axis(tmp_path):
    angle = np.pi / 2
    turned = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])  # z is x now
    rotation = np.stack([np.eye(3), turned])
    place = np.array([[0.0, 0, 0], [1.0, 5, 2]])
    figure = draw_cameras(rotation, place + 0.1, rotation, place)
    (axis,) = figure.axes
    outlines = [patch.get_xy() for patch in axis.patches]
    assert len(outlines) == 4  # two true cameras, then two predicted ones
    for outline, at, looks in zip(outlines, (*place, *(place + 0.1)), (rotation @ [0, 0, 1]).tolist() * 2, strict=True):
        tip, *corners = outline[:3]
        np.testing.assert_allclose(tip, at[[0, 2]])
        ahead = np.mean(corners, 0) - tip
        np.testing.assert_allclose(ahead / np.linalg.norm(ahead), np.array(looks)[[0, 2]], atol=1e-9)
    assert axis.get_aspect() == pytest.approx(1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "true",
        "predicted, in the unit of the truth",
    ]
    assert save_figure(figure, tmp_path / "cameras.png").is_file()
