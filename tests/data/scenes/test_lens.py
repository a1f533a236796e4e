"""Distorted photographs and depth maps come out as those of a pinhole camera."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support.downloads import write_dl3dv_download
from support.scene_formats import LENS

from gasp_fast.data.scenes.lens import distort
from gasp_fast.data.scenes.open import open_scene


def photographed_through(lens, camera, size, colour):
    """The photograph that a camera with `lens` takes of a world where the ray (x, y) has the colour `colour(x, y)`."""
    u, v = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    bent_x, bent_y = (u - camera[0, 2]) / camera[0, 0], (v - camera[1, 2]) / camera[1, 1]
    x, y = bent_x.copy(), bent_y.copy()
    for _ in range(100):  # the inverse of the lens, which the code under test never needs, by fixed point
        there_x, there_y = distort(x, y, lens)
        x, y = x + bent_x - there_x, y + bent_y - there_y
    return colour(x, y)


def test_distorted_photographs_come_out_as_pinhole_photographs(scene_world, tmp_path):
    root = write_dl3dv_download(
        tmp_path / "hash", scene_world, **dict(zip(("k1", "k2", "p1", "p2"), LENS, strict=True))
    )

    def colour(x, y):
        return np.stack([128 + 150 * x, 128 + 200 * y, 128 + 60 * np.sin(6 * x + 3 * y)], axis=-1)

    bent = photographed_through(LENS, scene_world.camera, scene_world.size, colour)
    Image.fromarray(np.rint(bent).astype(np.uint8)).save(root / "images_4" / "frame_00000.png")
    scene = open_scene(root)
    x, y = np.moveaxis(scene_world.pixels() - scene_world.camera[:2, 2], -1, 0)
    straight = colour(x / scene_world.camera[0, 0], y / scene_world.camera[1, 1])
    shown = scene.image(0).astype(float)
    inner = np.s_[10:-10, 10:-10]
    assert np.abs(shown - straight)[inner].max() < 1.5
    assert np.abs(bent - straight)[inner].max() > 4  # the lens did something


def test_the_lens_model_agrees_with_colmap():
    pycolmap = pytest.importorskip("pycolmap")
    camera = pycolmap.Camera(model="OPENCV", width=640, height=480, params=[500, 510, 320, 240, *LENS])
    rays = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 2))
    theirs = np.array([camera.img_from_cam(np.array([x, y, 1.0])) for x, y in rays])
    x, y = distort(rays[:, 0], rays[:, 1], LENS)
    np.testing.assert_allclose(np.stack([x * 500 + 320, y * 510 + 240], axis=1), theirs, atol=1e-9)


def test_depth_of_the_distorted_photograph_is_undistorted_with_it(scene_world, tmp_path):
    lens = dict(zip(("k1", "k2", "p1", "p2"), LENS, strict=True))
    root = write_dl3dv_download(tmp_path / "hash", scene_world, **lens)
    bent = photographed_through(LENS, scene_world.camera, scene_world.size, lambda x, y: 2 + x + 0.5 * y)
    np.save(root / "d.npy", bent.astype(np.float32))
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][0]["depth_file_path"] = "d.npy"
    (root / "transforms.json").write_text(json.dumps(meta))
    x, y = np.moveaxis(scene_world.pixels() - scene_world.camera[:2, 2], -1, 0)
    straight = 2 + x / scene_world.camera[0, 0] + 0.5 * y / scene_world.camera[1, 1]
    error = np.abs(open_scene(root).depth(0) - straight)[10:-10, 10:-10]
    assert error.max() < 0.6 * (1.0 + 0.5) / 300  # within half a pixel of the nearest one
