"""Damaged scenes give one line that names the file, or a counted skip: no crash, no hang, no path out of the folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.scene_formats import FORMAT_NAMES, write_colmap, write_model, write_scene_as

from gasp_fast.data.scenes.formats.colmap_model import ModelImage
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.build import build_tracks


@pytest.fixture
def copies(scene_boxes, tmp_path):
    """Writes the scene in a given format, as a copy that the test may damage."""

    def make(name: str) -> Path:
        root = tmp_path / name
        root.mkdir()
        write_scene_as(name, scene_boxes, root)
        return root

    return make


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("stated", ["../../secret/a.png", "/etc/hostname", "images/../../x.png"])
def test_a_json_path_that_leaves_the_scene_is_refused(copies, stated):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][3]["file_path"] = stated
    (root / "transforms.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="leads out of the scene folder") as caught:
        open_scene(root)
    assert stated in one_line(caught)


def test_a_json_depth_path_that_leaves_the_scene_is_refused(copies):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][0]["depth_file_path"] = "../d.npy"
    (root / "transforms.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"\.\./d\.npy: leads out"):
        open_scene(root)


def test_a_listed_name_that_leaves_the_scene_is_refused(copies):
    root = copies("vggt")
    names = json.loads((root / "image_names.json").read_text())
    (root / "image_names.json").write_text(json.dumps([*names[:-1], "../../x.png"]))
    with pytest.raises(ValueError, match=r"x\.png: leads out of the scene folder"):
        open_scene(root)


def test_a_colmap_name_that_leaves_the_scene_is_refused(scene_boxes, tmp_path):
    pytest.importorskip("pycolmap")
    lens = (0.0, 0.0, 0.0, 0.0)
    image = ModelImage("../../x.png", scene_boxes.image_size(0), scene_boxes.intrinsics(0), lens, scene_boxes.pose(0))
    write_model(tmp_path / "s" / "sparse", [image])
    (tmp_path / "s" / "images").mkdir()
    with pytest.raises(ValueError, match=r"x\.png: leads out of the scene folder"):
        open_scene(tmp_path / "s")


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_links_out_of_the_scene_are_refused(copies, tmp_path, name):
    root = copies(name)
    outside = tmp_path / "outside.png"
    image = sorted(root.rglob("*0003.png"))[0]
    shutil.move(image, outside)
    image.symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the scene folder") as caught:
        open_scene(root)
    assert "0003.png" in one_line(caught)


def test_a_linked_folder_out_of_the_scene_is_refused(copies, tmp_path):
    root = copies("rgbd")
    shutil.move(root / "depth", tmp_path / "elsewhere")
    (root / "depth").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the scene folder"):
        open_scene(root)


def test_a_computed_depth_index_that_leaves_the_scene_is_refused(copies):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    for entry in meta["frames"]:
        del entry["depth_file_path"]
    (root / "transforms.json").write_text(json.dumps(meta))
    (root / "computed_depth").mkdir()
    index = {"source": "mvs", "version": 1, "frames": {"0000": {"file": "../../d.npy"}}}
    (root / "computed_depth" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"d\.npy: leads out"):
        open_scene(root)


def test_links_inside_the_scene_and_to_the_scene_are_followed(copies, tmp_path):
    root = copies("rgbd")
    shutil.move(root / "color", root / "photographs")
    (root / "color").symlink_to("photographs")
    (tmp_path / "link").symlink_to(root)
    assert open_scene(tmp_path / "link").image(0).any()


BAD_POSES = {
    "pose is not finite": np.full((4, 4), np.nan),
    "no rotation": np.diag([2.0, 1, 1, 1]),
    "mirrors": np.diag([-1.0, 1, 1, 1]),
    "last row": np.eye(4) + np.eye(4, k=-3),
}


@pytest.mark.parametrize("reason", BAD_POSES)
@pytest.mark.parametrize("name", ["rgbd", "vggt", "dl3dv"])
def test_frames_with_an_impossible_pose_are_skipped_and_counted(copies, name, reason):
    root, pose = copies(name), BAD_POSES[reason]
    if name == "rgbd":
        np.savetxt(root / "pose" / "0002.txt", pose)
    elif name == "vggt":
        poses = np.load(root / "cam_from_worlds.npy")
        poses = np.concatenate([poses, np.tile([[[0.0, 0, 0, 1]]], (len(poses), 1, 1))], axis=1)
        poses[2] = pose
        np.save(root / "cam_from_worlds.npy", poses)
    else:
        meta = json.loads((root / "transforms.json").read_text())
        meta["frames"][2]["transform_matrix"] = pose.tolist()
        (root / "transforms.json").write_text(json.dumps(meta))
    scene = open_scene(root)
    assert len(scene) == 7 and "0002" not in scene.frame_names
    assert [skip.name for skip in scene.skipped] == ["0002"]
    assert reason in scene.skipped[0].reason


def test_a_scene_of_bad_poses_only_is_an_error(copies):
    root = copies("vggt")
    np.save(root / "cam_from_worlds.npy", np.full((8, 3, 4), np.nan))
    with pytest.raises(ValueError, match=r"no usable frame among 8.*pose is not finite"):
        open_scene(root)


@pytest.mark.parametrize("entry", [None, "text", [[1, 2], [3]], [[1.0] * 4] * 3])
def test_a_json_pose_of_any_shape_is_a_skip(copies, entry):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][0]["transform_matrix"] = entry
    (root / "transforms.json").write_text(json.dumps(meta))
    assert len(open_scene(root).skipped) == 1


def test_missing_poses_and_stray_depth_are_counted(copies):
    root = copies("rgbd")
    (root / "pose" / "0001.txt").unlink()
    (root / "color" / "0006.png").unlink()
    scene = open_scene(root)
    assert len(scene) == 6
    assert sorted(skip.name for skip in scene.skipped) == ["0001", "0006"]


def test_a_truncated_photograph_is_named(copies):
    root = copies("rgbd")
    path = root / "color" / "0004.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    scene = open_scene(root)
    with pytest.raises(OSError, match="cannot read image") as caught:
        scene.image(4)
    assert str(path) in one_line(caught)
    assert scene.image(3).any()


@pytest.mark.parametrize(("name", "suffix"), [("rgbd", "png"), ("vggt", "exr"), ("dl3dv", "npy"), ("colmap", "bin")])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_truncated_depth_map_is_named(copies, name, suffix, share):
    root = copies(name)
    path = next(path for path in sorted(root.rglob(f"*.{suffix}")) if "0003" in path.name and "color" not in str(path))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(OSError, match="cannot read depth") as caught:
        build_tracks(open_scene(root), frames=range(8))
    assert str(path) in one_line(caught)


def test_counts_that_do_not_match_are_named(copies):
    root = copies("vggt")
    np.save(root / "intrinsics.npy", np.load(root / "intrinsics.npy")[:-1])
    with pytest.raises(ValueError, match=r"intrinsics\.npy: has 7 entries for 8 names"):
        open_scene(root)


def test_frames_without_a_known_depth_give_no_tracks(scene_boxes, copies):
    root = copies("rgbd")

    width, height = scene_boxes.image_size(0)
    Image.fromarray(np.zeros((height, width), np.uint16)).save(root / "depth" / "0000.png")
    scene = open_scene(root)
    assert len(build_tracks(scene, frames=[0, 1, 2])) == 0  # nothing to start from
    tracks = build_tracks(scene, frames=[1, 0, 2])
    assert len(tracks) and not tracks.visible[:, 1].any()  # nothing to be seen against


def test_pickles_in_arrays_are_never_loaded(copies, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    root = copies("vggt")
    np.save(root / "intrinsics.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(OSError, match=r"intrinsics\.npy: cannot read array"):
        open_scene(root)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("intrinsics.txt", "1 0 x\n0 1 0\n0 0 1", "intrinsics.txt: not a matrix of numbers"),
        ("intrinsics.txt", "1 2 3", "intrinsics.txt: not a 3x3 or 4x4 matrix"),
        ("intrinsics.txt", "300 9 180\n0 300 108\n0 0 1", "skew"),
        ("intrinsics.txt", "0 0 180\n0 300 108\n0 0 1", "focal length 0"),
        ("pose/0001.txt", "1 0\n0 1 2", "0001.txt: not a matrix"),
        ("pose/0001.txt", "1 0 0\n0 1 0\n0 0 1", "a pose is a 4x4 matrix"),
        ("meta.json", "{", "meta.json: not JSON"),
        ("meta.json", '{"depth_scale": -1}', "depth_scale = -1"),
    ],
)
def test_unreadable_text_is_named(copies, file, text, message):
    root = copies("rgbd")
    (root / file).write_text(text)
    with pytest.raises(ValueError) as caught:
        open_scene(root)
    assert message in one_line(caught)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0000 1 2 3\n", "poses.txt: line 1 is not a key and 16 numbers"),
        ("0000" + " 1" * 15 + " x\n", "poses.txt: line 1 is not a key and 16 numbers"),
        (("0000" + " 1" * 16 + "\n") * 2, "poses.txt: line 2 is the second pose of '0000'"),
        ("\0" * 50, "poses.txt: line 1 is not a key and 16 numbers"),
        ("", "no usable frame among 8"),
    ],
)
def test_unreadable_packed_poses_are_named(copies, text, message):
    root = copies("rgbd")
    (root / "poses.txt").write_text(text)
    with pytest.raises(ValueError) as caught:
        open_scene(root)
    assert message in one_line(caught)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": []}, "has no list of frames"),
        ({"frames": [{"file_path": 3}]}, r"frames\[0\] has no file_path"),
        ({"frames": 7}, "has no list of frames"),
    ],
)
def test_a_json_without_frames_is_named(copies, changes, message):
    root = copies("dl3dv")
    rewrite(root / "transforms.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_scene(root)
    assert "transforms.json" in one_line(caught)


@pytest.mark.parametrize("key", ["fl_x", "cx", "w"])
def test_missing_or_odd_camera_numbers_are_named(copies, key):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][1][key] = "wide"
    (root / "transforms.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=rf"transforms\.json: {key} = 'wide' is not a number"):
        open_scene(root)


def test_the_error_for_a_folder_without_scene_names_the_files_of_each_format(tmp_path):
    with pytest.raises(ValueError, match=r"no scene of a known format.*intrinsics\.txt.*transforms\.json"):
        open_scene(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_scene(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cameras", "images", "points3D", "rigs", "frames"])
def test_colmap_files_are_counted_before_pycolmap_reads_them(scene_boxes, tmp_path, name):
    """pycolmap itself reads without end if a count is wrong."""
    points = dict.fromkeys(scene_boxes.frame_names, np.ones((5, 3)))
    write_colmap(scene_boxes, tmp_path, points)
    path = tmp_path / "sparse" / f"{name}.bin"
    whole = path.read_bytes()
    for damaged in ((1 << 40).to_bytes(8, "little") + whole[8:], whole[:-3], whole + b"x", whole[:5]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="damaged COLMAP file") as caught:
            open_scene(tmp_path)
        assert str(path) in one_line(caught)
    path.write_bytes(whole)
    assert len(open_scene(tmp_path)) == len(scene_boxes)


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "meta.json: not JSON"),
        (f'{{"depth_scale": {HUGE}}}', "depth_scale = 1000000000"),
        ('{"depth_scale": 1e-320}', "depth_scale = 9.99"),
        ('{"depth_scale": true}', "depth_scale = True is not a number"),
        (f'{{"depth_scale": {"[" * 900}{"]" * 900}}}', "depth_scale = [[["),
    ],
)
def test_numbers_and_nesting_without_end_are_one_short_line(copies, text, message):
    root = copies("rgbd")
    (root / "meta.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        open_scene(root)
    assert message in one_line(caught) and len(str(caught.value)) < 500


@pytest.mark.parametrize("key", ["fl_x", "k1", "w", "depth_unit_scale_factor"])
def test_an_integer_beyond_every_float_is_named(copies, key):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    for entry in meta["frames"]:
        entry["depth_file_path"] = entry["depth_file_path"].replace(".npy", ".png")
    meta["frames"][1][key] = 10**400
    (root / "transforms.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=rf"transforms\.json: {key} = 10000.* is not a number") as caught:
        open_scene(root)
    assert len(one_line(caught)) < 500


@pytest.mark.parametrize("matrix", [[[10**400] * 4] * 4, [[[[1]]]], [["1", "x"]]])
def test_a_json_pose_of_odd_numbers_is_a_skip(copies, matrix):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][2]["transform_matrix"] = matrix
    (root / "transforms.json").write_text(json.dumps(meta))
    assert [skip.name for skip in open_scene(root).skipped] == ["0002"]


@pytest.mark.parametrize("size", [(10**11, 216), (360, 0.4), (-360, 216)])
def test_frames_whose_camera_has_an_impossible_size_are_skipped(copies, size):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][5] |= dict(zip("wh", size, strict=True))
    (root / "transforms.json").write_text(json.dumps(meta))
    scene = open_scene(root)
    assert [skip.name for skip in scene.skipped] == ["0005"] and "camera has size" in scene.skipped[0].reason
    assert len(build_tracks(scene, frames=range(7)))


def test_a_colmap_camera_without_pixels_costs_its_frame_only(copies):
    root = copies("colmap")
    path = root / "sparse" / "cameras.bin"
    data = bytearray(path.read_bytes())
    data[16:24] = bytes(8)  # the width of the first camera
    path.write_bytes(data)
    scene = open_scene(root)
    assert len(scene) == 7 and "camera has size 0 x 216" in scene.skipped[0].reason
    assert build_tracks(scene, frames=range(7)).visible.any()


@pytest.mark.parametrize("stated", ["a\0/b.png", "\ud800/b.png", "x" * 300 + ".png", "y" * 300 + "/b.png"])
def test_names_that_no_file_can_have_are_one_line(copies, stated):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][3]["file_path"] = stated
    (root / "transforms.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is not a path") as caught:
        open_scene(root)
    assert str(root) in one_line(caught) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_pipes_in_place_of_any_file_end_in_one_line_or_a_skip(copies, name):
    """Opening a pipe waits for a writer, for ever."""
    root = copies(name)
    for path in sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()):
        if path.stem[:4] in ("0001", "0002", "0003", "0004", "0005", "0006", "0007"):
            continue
        damaged = shutil.copytree(root, root.with_name("damaged"))
        (damaged / path).unlink()
        os.mkfifo(damaged / path)
        try:
            scene = open_scene(damaged)
            for i in range(len(scene)):
                scene.image(i), scene.depth(i)
        except (OSError, ValueError) as error:
            assert "\n" not in str(error) and str(damaged) in str(error), path
        shutil.rmtree(damaged)


@pytest.mark.parametrize("field", ["file", "error", "reason"])
def test_an_index_of_computed_depth_with_odd_fields_is_damaged(copies, field):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    for entry in meta["frames"]:
        del entry["depth_file_path"]
    (root / "transforms.json").write_text(json.dumps(meta))
    (root / "computed_depth").mkdir()
    index = {"source": "mvs", "version": 1, "frames": {"0000": {"file": None, field: [1]}}}
    (root / "computed_depth" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: damaged; delete it and run gasp-fast depth again"):
        open_scene(root)


@pytest.mark.parametrize("name", ["dl3dv", "rgbd", "vggt"])
def test_a_scene_has_a_stated_number_of_frames(copies, name, monkeypatch):
    root = copies(name)
    monkeypatch.setattr("gasp_fast.data.scenes.scene.MOST_FRAMES", 7)
    with pytest.raises(ValueError, match=r"8 frames; a scene has at most 7; divide it into several"):
        open_scene(root)


def test_two_hundred_thousand_frames_are_refused_in_seconds(copies):
    root = copies("dl3dv")
    meta = json.loads((root / "transforms.json").read_text())
    rewrite(root / "transforms.json", frames=meta["frames"] * 25_000)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"transforms\.json: 200,000 frames; a scene has at most 32,768"):
        open_scene(root)
    assert time.process_time() - began < 5
