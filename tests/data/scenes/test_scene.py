"""A scene decodes lazily, in any thread, and never returns stale pixels."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.scene_formats import write_depth

from gasp_fast.data.scenes.frame_cache import DECODED, DEFAULT_BYTES
from gasp_fast.data.scenes.open import open_scene


def test_opening_reads_no_pixels(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    for path in [*(root / "depth").iterdir(), *sorted((root / "color").iterdir())[1:]]:
        path.write_bytes(b"not an image")
    scene = open_scene(root)
    assert len(scene) == 8
    with pytest.raises(OSError, match=r"depth.0003\.png"):
        scene.depth(3)


def test_many_threads_read_the_same_as_one(scene_boxes):
    requests = list(range(len(scene_boxes))) * 6
    DECODED.resize(500_000)  # room for a few frames: frames are dropped while others are read
    try:
        with ThreadPoolExecutor(8) as pool:
            depths = list(pool.map(scene_boxes.depth, requests))
            images = list(pool.map(scene_boxes.image, requests))
    finally:
        DECODED.resize(DEFAULT_BYTES)
    for k, f in enumerate(requests):
        assert np.array_equal(depths[k], scene_boxes.depth(f)) and np.array_equal(images[k], scene_boxes.image(f))


def test_a_scene_pickles_without_its_pixels(scene_boxes):
    scene_boxes.image(0)
    packed = pickle.dumps(scene_boxes)
    assert len(packed) < 20_000
    assert np.array_equal(pickle.loads(packed).depth(2), scene_boxes.depth(2))


def test_a_rewritten_file_is_read_again(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    before = open_scene(root).depth(0)
    write_depth(root / "depth" / "0000.png", before + 1, scale=1e-3)
    np.testing.assert_allclose(open_scene(root).depth(0), before + 1, atol=1e-3)


def test_read_ahead_leaves_nothing_to_decode(scene_boxes):
    DECODED.resize(0)
    DECODED.resize(DEFAULT_BYTES)
    scene_boxes.read_ahead([4, 5])
    held = DECODED.held_bytes
    assert held == sum(scene_boxes.depth(f).nbytes + scene_boxes.image(f).nbytes for f in (4, 5))
    assert DECODED.held_bytes == held


def test_callers_own_the_image_and_share_the_depth(scene_boxes):
    scene_boxes.image(0)[:] = 0
    assert scene_boxes.image(0).any()
    with pytest.raises(ValueError, match="read-only"):
        scene_boxes.depth(0)[0, 0] = 1


def test_frame_indices_are_checked(scene_boxes):
    assert np.array_equal(scene_boxes.pose(-1), scene_boxes.pose(7))
    with pytest.raises(IndexError, match="frame 8 of"):
        scene_boxes.depth(8)
