"""Promises about reading scenes: conventions, the four formats, lenses, laziness."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gasp_fast.data.scenes import frame_cache
from gasp_fast.data.scenes.depth_maps import DepthFile, read_depth, write_depth
from gasp_fast.data.scenes.formats import FORMATS, format_named
from gasp_fast.data.scenes.formats.colmap_model import ModelImage, write_model
from gasp_fast.data.scenes.lens import distort
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.build import build_tracks

FORMAT_NAMES = [module.NAME for module in FORMATS]
LENS = (0.08, -0.03, 0.004, -0.002)


@pytest.fixture(params=FORMAT_NAMES)
def rewritten(request, scene_boxes, tmp_path):
    root = tmp_path / request.param
    root.mkdir()
    format_named(request.param).write(scene_boxes, root)
    return request.param, open_scene(root)


def test_the_rgbd_layout_means_what_it_says(scene_world, scene_boxes):
    assert scene_boxes.format == "rgbd" and len(scene_boxes) == scene_world.frames
    for f in range(len(scene_boxes)):
        np.testing.assert_allclose(scene_boxes.pose(f), scene_world.pose(f), atol=1e-12)
        np.testing.assert_allclose(scene_boxes.intrinsics(f), scene_world.camera)
        np.testing.assert_allclose(scene_boxes.depth(f), scene_world.depth(f), atol=5.1e-4)
        assert np.array_equal(scene_boxes.image(f), scene_world.image(f))
        assert scene_boxes.image_size(f) == scene_world.size


def test_every_format_is_detected_and_gives_the_same_scene(rewritten, scene_boxes):
    name, scene = rewritten
    assert scene.format == name
    assert scene.frame_names == scene_boxes.frame_names and not scene.skipped
    for f in range(len(scene)):
        np.testing.assert_allclose(scene.pose(f), scene_boxes.pose(f), atol=1e-12)
        np.testing.assert_allclose(scene.intrinsics(f), scene_boxes.intrinsics(f), rtol=1e-15)
        assert np.array_equal(scene.depth(f), scene_boxes.depth(f))
        assert np.array_equal(scene.image(f), scene_boxes.image(f))


def test_every_format_gives_the_same_tracks(rewritten, scene_boxes):
    _, scene = rewritten
    for grid in (8, 24):
        ours = build_tracks(scene, frames=[1, 0, 4, 7], grid=grid)
        original = build_tracks(scene_boxes, frames=[1, 0, 4, 7], grid=grid)
        assert len(ours) > grid
        assert np.array_equal(ours.query, original.query) and np.array_equal(ours.visible, original.visible)
        np.testing.assert_allclose(ours.uv, original.uv, atol=1e-9)
        np.testing.assert_allclose(ours.depth, original.depth, atol=1e-12)


def test_a_vggt_folder_written_by_hand(scene_world, tmp_path):
    for folder in ("images", "depths"):
        (tmp_path / folder).mkdir()
    for f in range(3):
        Image.fromarray(scene_world.image(f)).save(tmp_path / "images" / f"{f}.jpg")
        write_depth(tmp_path / "depths" / f"{f}.exr", scene_world.depth(f).astype(np.float32))
    (tmp_path / "image_names.json").write_text(json.dumps([f"{f}.jpg" for f in range(3)]))
    np.save(tmp_path / "cam_from_worlds.npy", np.stack([scene_world.pose(f)[:3] for f in range(3)]))
    np.save(tmp_path / "intrinsics.npy", np.stack([scene_world.camera] * 3).astype(np.float32))
    scene = open_scene(tmp_path)
    assert scene.format == "vggt" and scene.frame_names == ["0", "1", "2"]
    np.testing.assert_allclose(scene.depth(2), scene_world.depth(2), rtol=1e-6)
    np.testing.assert_allclose(scene.pose(2), scene_world.pose(2))


# ---- DL3DV ----------------------------------------------------------------------------------------------------------


def write_dl3dv(root: Path, world, image_folder: str = "images_4", json_folder: str = ".", **extra) -> Path:
    """As DL3DV ships it: intrinsics for four times the stored size, camera-to-world in Blender axes."""
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    (root / image_folder).mkdir(parents=True)
    (root / json_folder).mkdir(parents=True, exist_ok=True)
    entries = []
    for f in range(world.frames):
        Image.fromarray(world.image(f)).save(root / image_folder / f"frame_{f:05d}.png")
        matrix = np.linalg.inv(world.pose(f)) @ flip
        entries.append({"file_path": f"images/frame_{f:05d}.png", "transform_matrix": matrix.tolist()})
    focal = {"fl_x": 4 * world.camera[0, 0], "fl_y": 4 * world.camera[1, 1]}
    centre = {"cx": 4 * world.camera[0, 2], "cy": 4 * world.camera[1, 2]}
    size = {"w": 4 * world.size[0], "h": 4 * world.size[1]}
    meta = {"camera_model": "OPENCV", **focal, **centre, **size, "frames": entries, **extra}
    (root / json_folder / "transforms.json").write_text(json.dumps(meta))
    return root


@pytest.mark.parametrize(
    ("image_folder", "json_folder"),
    [("images_4", "."), ("colmap/images_4", "."), ("nerfstudio/images_4", "nerfstudio"), ("images_8", "colmap")],
)
def test_dl3dv_is_read_wherever_its_photographs_lie(scene_world, tmp_path, image_folder, json_folder):
    scene = open_scene(write_dl3dv(tmp_path / "hash", scene_world, image_folder, json_folder))
    assert scene.format == "dl3dv" and len(scene) == scene_world.frames
    assert not scene.has_depth
    for f in (0, 5):
        np.testing.assert_allclose(scene.pose(f), scene_world.pose(f), atol=1e-12)
        np.testing.assert_allclose(scene.intrinsics(f), scene_world.camera)
        assert np.array_equal(scene.image(f), scene_world.image(f))


def test_a_scene_without_depth_says_how_to_make_it(scene_world, tmp_path):
    scene = open_scene(write_dl3dv(tmp_path / "hash", scene_world))
    with pytest.raises(ValueError, match="gasp-fast depth"):
        scene.depth(0)


def test_json_frames_without_a_photograph_are_skipped_and_counted(scene_world, tmp_path):
    root = write_dl3dv(tmp_path / "hash", scene_world)
    (root / "images_4" / "frame_00002.png").unlink()
    (root / "images_4" / "frame_00005.png").unlink()
    scene = open_scene(root)
    assert len(scene) == scene_world.frames - 2
    assert [skip.name for skip in scene.skipped] == ["frame_00002", "frame_00005"]
    np.testing.assert_allclose(scene.pose(2), scene_world.pose(3), atol=1e-12)


def test_photographs_of_one_name_in_two_folders_stay_apart(scene_world, tmp_path):
    root = write_dl3dv(tmp_path / "hash", scene_world)
    meta = json.loads((root / "transforms.json").read_text())
    for f, entry in enumerate(meta["frames"]):
        place = root / "images_4" / ("left" if f % 2 else "right")
        place.mkdir(exist_ok=True)
        shutil.move(root / "images_4" / f"frame_{f:05d}.png", place / f"{f // 2}.png")
        entry["file_path"] = f"./images/{place.name}/{f // 2}.png"
    (root / "transforms.json").write_text(json.dumps(meta))
    scene = open_scene(root)
    assert scene.frame_names[:3] == ["right/0", "left/0", "right/1"]
    assert all(np.array_equal(scene.image(f), scene_world.image(f)) for f in range(8))


def test_a_dl3dv_folder_with_its_colmap_model_is_still_dl3dv(scene_world, tmp_path):
    root = write_dl3dv(tmp_path / "hash", scene_world)
    camera = (scene_world.size, scene_world.camera, (0.0, 0.0, 0.0, 0.0))
    write_model(root / "colmap" / "sparse" / "0", [ModelImage("frame_00000.png", *camera, scene_world.pose(0))])
    scene = open_scene(root)
    assert scene.format == "dl3dv" and scene.sparse_model == root / "colmap" / "sparse" / "0"


@pytest.mark.parametrize(
    "lens",
    [{"k3": 0.01}, {"camera_model": "OPENCV_FISHEYE"}, {"camera_model": "EQUIRECTANGULAR"}, {"is_fisheye": True}],
)
def test_a_lens_we_cannot_straighten_is_refused(scene_world, tmp_path, lens):
    root = write_dl3dv(tmp_path / "hash", scene_world, **lens)
    with pytest.raises(ValueError, match=r"transforms\.json.*undistort"):
        open_scene(root)


# ---- lenses ---------------------------------------------------------------------------------------------------------


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
    root = write_dl3dv(tmp_path / "hash", scene_world, **dict(zip(("k1", "k2", "p1", "p2"), LENS, strict=True)))

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


def test_our_lens_is_colmaps_lens():
    pycolmap = pytest.importorskip("pycolmap")
    camera = pycolmap.Camera(model="OPENCV", width=640, height=480, params=[500, 510, 320, 240, *LENS])
    rays = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 2))
    theirs = np.array([camera.img_from_cam(np.array([x, y, 1.0])) for x, y in rays])
    x, y = distort(rays[:, 0], rays[:, 1], LENS)
    np.testing.assert_allclose(np.stack([x * 500 + 320, y * 510 + 240], axis=1), theirs, atol=1e-9)


def test_depth_drawn_on_the_distorted_photograph_is_straightened_with_it(scene_world, tmp_path):
    lens = dict(zip(("k1", "k2", "p1", "p2"), LENS, strict=True))
    root = write_dl3dv(tmp_path / "hash", scene_world, **lens)
    bent = photographed_through(LENS, scene_world.camera, scene_world.size, lambda x, y: 2 + x + 0.5 * y)
    np.save(root / "d.npy", bent.astype(np.float32))
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][0]["depth_file_path"] = "d.npy"
    (root / "transforms.json").write_text(json.dumps(meta))
    x, y = np.moveaxis(scene_world.pixels() - scene_world.camera[:2, 2], -1, 0)
    straight = 2 + x / scene_world.camera[0, 0] + 0.5 * y / scene_world.camera[1, 1]
    error = np.abs(open_scene(root).depth(0) - straight)[10:-10, 10:-10]
    assert error.max() < 0.6 * (1.0 + 0.5) / 300  # within half a pixel of the nearest one


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("SIMPLE_PINHOLE", [300, 180, 108], (0, 0, 0, 0)),
        ("SIMPLE_RADIAL", [300, 180, 108, 0.05], (0.05, 0, 0, 0)),
        ("RADIAL", [300, 180, 108, 0.05, 0.01], (0.05, 0.01, 0, 0)),
        ("OPENCV", [300, 310, 180, 108, *LENS], LENS),
    ],
)
def test_colmap_cameras_keep_their_lens(tmp_path, model, params, expected):
    write_colmap_camera(tmp_path, model, params)
    frame = open_scene(tmp_path).frames[0]
    assert frame.distortion == expected
    assert frame.intrinsics[0, 0] == 300 and frame.intrinsics[0, 2] == 180 and frame.intrinsics[1, 2] == 108


def test_a_colmap_fisheye_is_refused(tmp_path):
    write_colmap_camera(tmp_path, "OPENCV_FISHEYE", [300, 310, 180, 108, 0.1, 0, 0, 0])
    with pytest.raises(ValueError, match=r"OPENCV_FISHEYE.*image_undistorter"):
        open_scene(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".txt"])
def test_colmap_models_are_read_in_binary_and_in_text(tmp_path, suffix):
    write_colmap_camera(tmp_path, "PINHOLE", [300, 310, 180, 108], text=suffix == ".txt")
    scene = open_scene(tmp_path)
    assert (scene.format, len(scene), scene.image_size(0)) == ("colmap", 1, (36, 22))
    np.testing.assert_allclose(scene.intrinsics(0)[0], [30, 0, 18])  # the photograph is a tenth of the camera's size


def write_colmap_camera(root: Path, model: str, params: list[float], text: bool = False) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    (root / "sparse" / "0").mkdir(parents=True)
    (root / "images").mkdir()
    Image.new("RGB", (36, 22)).save(root / "images" / "a.png")
    rec = pycolmap.Reconstruction()
    rec.add_camera_with_trivial_rig(pycolmap.Camera(model=model, width=360, height=220, params=params, camera_id=1))
    rec.add_image_with_trivial_frame(pycolmap.Image(name="a.png", camera_id=1, image_id=1), pycolmap.Rigid3d())
    (rec.write_text if text else rec.write_binary)(str(root / "sparse" / "0"))


# ---- depth files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".png", ".exr", ".geometric.bin"])
def test_depth_files_round_trip(tmp_path, suffix):
    depth = np.round(np.random.default_rng(0).uniform(0.5, 60, (23, 31)), 3).astype(np.float32)
    depth[3:5] = 0
    scale = 1e-3 if suffix == ".png" else 1.0
    write_depth(tmp_path / f"d{suffix}", depth, scale)
    np.testing.assert_allclose(read_depth(tmp_path / f"d{suffix}", scale), depth, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".npy", ".exr", ".geometric.bin"])
def test_whatever_is_no_depth_becomes_unknown(tmp_path, suffix):
    depth = np.array([[1.0, np.nan, np.inf], [-2.0, 0.0, -np.inf]], np.float32)
    write_depth(tmp_path / f"d{suffix}", depth)
    assert read_depth(tmp_path / f"d{suffix}").tolist() == [[1, 0, 0], [0, 0, 0]]


def test_geometric_maps_are_read_as_colmap_reads_them(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    depth = np.random.default_rng(0).uniform(1, 5, (7, 11)).astype(np.float32)
    pycolmap.DepthMap.from_array(depth, 0.5, 9.0).write(str(tmp_path / "theirs.bin"))
    write_depth(tmp_path / "ours.bin", depth)
    assert np.array_equal(read_depth(tmp_path / "theirs.bin"), depth)
    theirs = pycolmap.DepthMap()
    theirs.read(str(tmp_path / "ours.bin"))
    assert np.array_equal(theirs.to_array(), depth)


def test_an_eight_bit_picture_is_no_depth_map(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "d.png")
    with pytest.raises(OSError, match="one channel of 16 bits, this one is L"):
        read_depth(tmp_path / "d.png")


def test_a_png_too_small_for_its_depth_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not fit 16 bits"):
        write_depth(tmp_path / "d.png", np.full((2, 2), 70.0, np.float32), scale=1e-3)


# ---- laziness, threads, processes -----------------------------------------------------------------------------------


def test_opening_reads_no_pixels(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    for path in [*(root / "depth").iterdir(), *sorted((root / "color").iterdir())[1:]]:
        path.write_bytes(b"not an image")
    scene = open_scene(root)
    assert len(scene) == 8
    with pytest.raises(OSError, match=r"depth.0003\.png"):
        scene.depth(3)


def test_many_threads_see_what_one_sees(scene_boxes):
    wanted = list(range(len(scene_boxes))) * 6
    frame_cache.DECODED.resize(500_000)  # a few frames: the store is churned while it is read
    try:
        with ThreadPoolExecutor(8) as pool:
            depths = list(pool.map(scene_boxes.depth, wanted))
            images = list(pool.map(scene_boxes.image, wanted))
    finally:
        frame_cache.DECODED.resize(256 << 20)
    for k, f in enumerate(wanted):
        assert np.array_equal(depths[k], scene_boxes.depth(f)) and np.array_equal(images[k], scene_boxes.image(f))


def test_a_scene_pickles_without_its_pixels(scene_boxes):
    scene_boxes.image(0)
    packed = pickle.dumps(scene_boxes)
    assert len(packed) < 20_000
    assert np.array_equal(pickle.loads(packed).depth(2), scene_boxes.depth(2))


def test_the_store_of_decoded_frames_stays_within_its_bound():
    store = frame_cache.FrameCache(limit_bytes=1000)
    for k in range(50):
        assert store.get(k, lambda k=k: np.full(25, k, np.int64))[0] == k
        assert store.held_bytes <= 1000
    store.get(49, lambda: pytest.fail("the last one is held"))
    assert store.hits == 1
    store.get("big", lambda: np.zeros(4000, np.uint8))
    assert store.held_bytes <= 1000


def test_a_rewritten_file_is_read_anew(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    before = open_scene(root).depth(0)
    write_depth(root / "depth" / "0000.png", before + 1, scale=1e-3)
    np.testing.assert_allclose(open_scene(root).depth(0), before + 1, atol=1e-3)


def test_read_ahead_leaves_nothing_to_decode(scene_boxes):
    scene_boxes.read_ahead([4, 5])
    misses = frame_cache.DECODED.misses
    for f in (4, 5):
        scene_boxes.depth(f)
        scene_boxes.image(f)
    assert frame_cache.DECODED.misses == misses


def test_a_forked_worker_is_not_held_up_by_its_parents_threads():
    store = frame_cache.DECODED
    with store._lock:  # as a reading thread of the parent would
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            held = store.get("forked", lambda: np.ones(3)).sum() == 3
            os._exit(0 if held else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_callers_own_the_image_and_share_the_depth(scene_boxes):
    scene_boxes.image(0)[:] = 0
    assert scene_boxes.image(0).any()
    with pytest.raises(ValueError, match="read-only"):
        scene_boxes.depth(0)[0, 0] = 1


def test_frame_indices_are_checked(scene_boxes):
    assert np.array_equal(scene_boxes.pose(-1), scene_boxes.pose(7))
    with pytest.raises(IndexError, match="frame 8 of"):
        scene_boxes.depth(8)


def test_depth_scale_comes_from_meta(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    (root / "meta.json").write_text(json.dumps({"depth_scale": 5000}))
    np.testing.assert_allclose(open_scene(root).depth(0), open_scene(scene_boxes_folder).depth(0) / 5, rtol=1e-6)


def test_a_depth_file_is_where_it_says(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((2, 2), np.float16))
    assert DepthFile(tmp_path / "d.npy", scale=2.0).read().tolist() == [[2, 2], [2, 2]]
