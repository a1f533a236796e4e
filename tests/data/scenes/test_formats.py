"""Every format is detected and gives the same scene, with the same conventions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import run
from support.downloads import write_dl3dv_download
from support.scene_formats import FORMAT_NAMES, LENS, write_depth, write_model, write_scene_as

from gasp_fast.cli import scenes as command
from gasp_fast.data.scenes.formats.colmap_model import ModelImage
from gasp_fast.data.scenes.formats.pose_files import pack_poses
from gasp_fast.data.scenes.library import find_scenes, scene_digest
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.build import build_tracks


@pytest.fixture(params=FORMAT_NAMES)
def rewritten(request, scene_boxes, tmp_path):
    root = tmp_path / request.param
    root.mkdir()
    write_scene_as(request.param, scene_boxes, root)
    return request.param, open_scene(root)


def test_the_rgbd_layout_gives_the_world_it_was_written_from(scene_world, scene_boxes):
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


def test_a_vggt_folder_written_by_hand_is_read(scene_world, tmp_path):
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


@pytest.mark.parametrize(
    ("image_folder", "json_folder"),
    [("images_4", "."), ("colmap/images_4", "."), ("nerfstudio/images_4", "nerfstudio"), ("images_8", "colmap")],
)
def test_dl3dv_is_read_from_every_layout_of_its_photographs(scene_world, tmp_path, image_folder, json_folder):
    scene = open_scene(write_dl3dv_download(tmp_path / "hash", scene_world, image_folder, json_folder))
    assert scene.format == "dl3dv" and len(scene) == scene_world.frames
    assert not scene.has_depth
    for f in (0, 5):
        np.testing.assert_allclose(scene.pose(f), scene_world.pose(f), atol=1e-12)
        np.testing.assert_allclose(scene.intrinsics(f), scene_world.camera)
        assert np.array_equal(scene.image(f), scene_world.image(f))


def test_the_error_for_a_scene_without_depth_names_the_command_that_computes_it(scene_world, tmp_path):
    scene = open_scene(write_dl3dv_download(tmp_path / "hash", scene_world))
    with pytest.raises(ValueError, match="gasp-fast depth"):
        scene.depth(0)


def test_json_frames_without_a_photograph_are_skipped_and_counted(scene_world, tmp_path):
    root = write_dl3dv_download(tmp_path / "hash", scene_world)
    (root / "images_4" / "frame_00002.png").unlink()
    (root / "images_4" / "frame_00005.png").unlink()
    scene = open_scene(root)
    assert len(scene) == scene_world.frames - 2
    assert [skip.name for skip in scene.skipped] == ["frame_00002", "frame_00005"]
    np.testing.assert_allclose(scene.pose(2), scene_world.pose(3), atol=1e-12)


def test_photographs_of_one_name_in_two_folders_stay_apart(scene_world, tmp_path):
    root = write_dl3dv_download(tmp_path / "hash", scene_world)
    meta = json.loads((root / "transforms.json").read_text())
    for f, entry in enumerate(meta["frames"]):
        place = root / "images_4" / ("left" if f % 2 else "right")
        place.mkdir(exist_ok=True)
        shutil.move(root / "images_4" / f"frame_{f:05d}.png", place / f"{f // 2}.png")
        entry["file_path"] = f"./images/{place.name}/{f // 2}.png"
    (root / "transforms.json").write_text(json.dumps(meta))
    scene = open_scene(root)
    assert scene.frame_names == [*(f"left/{n}" for n in range(4)), *(f"right/{n}" for n in range(4))]
    for f in range(8):
        assert np.array_equal(scene.image(f // 2 if f % 2 else 4 + f // 2), scene_world.image(f))


def test_the_frames_of_dl3dv_are_in_the_order_of_their_names_whatever_that_of_the_json(scene_world, tmp_path):
    root = write_dl3dv_download(tmp_path / "hash", scene_world)
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"] = [meta["frames"][f] for f in (3, 0, 7, 1, 6, 2, 5, 4)]
    (root / "transforms.json").write_text(json.dumps(meta))
    scene = open_scene(root)
    assert scene.frame_names == [f"frame_{f:05d}" for f in range(8)]
    for f in range(8):
        assert np.array_equal(scene.image(f), scene_world.image(f))
        np.testing.assert_allclose(scene.pose(f), scene_world.pose(f), atol=1e-12)


def test_a_dl3dv_folder_with_its_colmap_model_is_still_dl3dv(scene_world, tmp_path):
    root = write_dl3dv_download(tmp_path / "hash", scene_world)
    camera = (scene_world.size, scene_world.camera, (0.0, 0.0, 0.0, 0.0))
    write_model(root / "colmap" / "sparse" / "0", [ModelImage("frame_00000.png", *camera, scene_world.pose(0))])
    scene = open_scene(root)
    assert scene.format == "dl3dv" and scene.sparse_model == root / "colmap" / "sparse" / "0"


@pytest.mark.parametrize(
    "lens",
    [{"k3": 0.01}, {"camera_model": "OPENCV_FISHEYE"}, {"camera_model": "EQUIRECTANGULAR"}, {"is_fisheye": True}],
)
def test_a_lens_that_cannot_be_undistorted_is_refused(scene_world, tmp_path, lens):
    root = write_dl3dv_download(tmp_path / "hash", scene_world, **lens)
    with pytest.raises(ValueError, match=r"transforms\.json.*undistort"):
        open_scene(root)


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("SIMPLE_PINHOLE", [300, 180, 108], (0, 0, 0, 0)),
        ("SIMPLE_RADIAL", [300, 180, 108, 0.05], (0.05, 0, 0, 0)),
        ("RADIAL", [300, 180, 108, 0.05, 0.01], (0.05, 0.01, 0, 0)),
        ("OPENCV", [300, 310, 180, 108, *LENS], LENS),
        ("FULL_OPENCV", [300, 310, 180, 108, *LENS, 0, 0, 0, 0], LENS),
        ("FULL_OPENCV", [300, 310, 180, 108, *[0] * 8], (0, 0, 0, 0)),
    ],
)
def test_colmap_cameras_keep_their_lens(tmp_path, model, params, expected):
    write_colmap_camera(tmp_path, model, params)
    frame = open_scene(tmp_path).frames[0]
    assert frame.distortion == expected
    assert frame.intrinsics[0, 0] == 300 and frame.intrinsics[0, 2] == 180 and frame.intrinsics[1, 2] == 108


@pytest.mark.parametrize("term", range(4))
def test_further_terms_of_a_full_opencv_camera_are_refused(tmp_path, term):
    further = [0.0, 0.0, 0.0, 0.0]
    further[term] = 0.25
    write_colmap_camera(tmp_path, "FULL_OPENCV", [300, 310, 180, 108, *LENS, *further])
    with pytest.raises(ValueError, match=rf"FULL_OPENCV of a\.png has k{term + 3} = 0\.25.*image_undistorter"):
        open_scene(tmp_path)


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


def test_depth_scale_comes_from_meta(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    (root / "meta.json").write_text(json.dumps({"depth_scale": 5000}))
    np.testing.assert_allclose(open_scene(root).depth(0), open_scene(scene_boxes_folder).depth(0) / 5, rtol=1e-6)


def test_packed_poses_give_the_same_scene_and_one_file_to_open(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    before = open_scene(root)
    pack_poses(root)
    shutil.rmtree(root / "pose")
    after = open_scene(root)
    assert scene_digest(after) == scene_digest(before) and after.frame_names == before.frame_names
    assert find_scenes(tmp_path) == ["s"]
    pack_poses(root)  # nothing to pack: what there is stays
    assert scene_digest(open_scene(root)) == scene_digest(before)


def test_the_command_packs_poses_of_rgbd_scenes_only(scene_boxes_folder, scene_boxes, tmp_path, capsys):
    shutil.copytree(scene_boxes_folder, tmp_path / "rgbd")
    (tmp_path / "vggt").mkdir()
    write_scene_as("vggt", scene_boxes, tmp_path / "vggt")
    assert run(command, tmp_path, "--pack-poses", "--jobs", 1) == 0
    assert [path.parent.name for path in tmp_path.rglob("poses.txt")] == ["rgbd"]


def test_a_frame_without_a_packed_pose_is_skipped_and_named(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    pack_poses(root)
    lines = (root / "poses.txt").read_text().splitlines()
    (root / "poses.txt").write_text("\n".join([*lines[:3], *lines[4:]]))
    scene = open_scene(root)
    assert [skip.name for skip in scene.skipped] == ["0003"] and "poses.txt has no pose" in scene.skipped[0].reason
