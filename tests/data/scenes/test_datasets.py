"""What is particular to published data sets: other depth cameras, lost poses, time stamps, lenses, files elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.box_world import BoxWorld
from support.dataset_formats import TO_ZERO, write_replica, write_scannet, write_tum, write_units

from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene


def test_scannet_depth_of_another_camera_lies_on_the_photographs(scene_world: BoxWorld, scene_boxes, tmp_path) -> None:
    """Half the size, a wider view, and a centre of its own, as a depth camera beside the colour camera has."""
    write_scannet(scene_boxes, tmp_path)
    own = np.array([[120.0, 0, 92.0], [0, 121.0, 50.0], [0, 0, 1]])
    depth_world = replace(scene_world, camera=own, size=(180, 108))
    for f, name in enumerate(scene_boxes.frame_names):
        write_units(tmp_path / "depth" / f"{name}.png", depth_world.depth(f), 1000)
    np.savetxt(tmp_path / "intrinsic" / "intrinsic_depth.txt", own - TO_ZERO)
    scene = open_scene(tmp_path)
    assert scene.format == "scannet" and scene.depth(0).shape == (108, 180)
    truth = scene_world.depth(3).reshape(108, 2, 180, 2)
    nearest, farthest = truth.min((1, 3)) * 0.98, truth.max((1, 3)) * 1.02
    known = scene.depth(3) > 0
    assert known.mean() > 0.95
    inside = (scene.depth(3) >= nearest) & (scene.depth(3) <= farthest)
    assert inside[known].mean() > 0.97
    mistaken = replace(
        scene, frames=tuple(replace(one, depth=replace(one.depth, camera=None)) for one in scene.frames)
    ).depth(3)
    assert ((mistaken >= nearest) & (mistaken <= farthest)).mean() < 0.9
    assert check_scene(scene).sound


def test_scannet_frames_without_tracking_are_skipped(scene_boxes: Scene, tmp_path: Path) -> None:
    write_scannet(scene_boxes, tmp_path)
    (tmp_path / "pose" / "0002.txt").write_text("-inf -inf -inf -inf\n" * 4)
    scene = open_scene(tmp_path)
    assert len(scene) == 7 and [(one.name, one.reason) for one in scene.skipped] == [("0002", "pose is not finite")]
    (tmp_path / "intrinsic" / "intrinsic_depth.txt").unlink()
    with pytest.raises(OSError, match=r"intrinsic_depth\.txt: missing"):
        open_scene(tmp_path)


def test_tum_photographs_take_the_pose_and_the_depth_of_their_time(scene_boxes: Scene, tmp_path: Path) -> None:
    root = tmp_path / "rgbd_dataset_freiburg3_long_office"
    root.mkdir()
    write_tum(scene_boxes, root, units_per_metre=5000.0)
    lines = (root / "depth.txt").read_text().splitlines()
    (root / "depth.txt").write_text("\n".join([*lines[:3], *lines[4:]]))  # frame 2 has no depth within 20 ms
    stamps = (root / "groundtruth.txt").read_text().splitlines()
    kept = [line for line in stamps if line[0] == "#" or not 0.12 < float(line.split()[0]) - 1_305_031_102 < 0.185]
    (root / "groundtruth.txt").write_text("\n".join(kept))
    scene = open_scene(root)
    assert scene.format == "tum" and [skip.name for skip in scene.skipped] == ["0004", "0005"]  # at .133 and .167
    assert all("no pose within 0.02 s" in skip.reason for skip in scene.skipped)
    assert [frame.name for frame in scene.frames if frame.depth is None] == ["0002"]
    for i, name in enumerate(scene.frame_names):
        np.testing.assert_allclose(scene.pose(i), scene_boxes.pose(int(name)), atol=1e-12)
    np.testing.assert_allclose(scene.depth(0), scene_boxes.depth(0), atol=1.1e-4)
    (root / "intrinsics.txt").unlink()
    np.testing.assert_allclose(open_scene(root).intrinsics(0)[0], [535.4, 0, 320.6])
    other = root.rename(root.with_name("rgbd_dataset_freiburg1_desk"))
    with pytest.raises(ValueError, match=r"intrinsics\.txt: missing; the photographs of freiburg1 .* are distorted"):
        open_scene(other)


@pytest.mark.parametrize("lines", ["1.0 rgb/0000.png more", "one rgb/0000.png", "1.0"])
def test_a_tum_list_with_other_lines_is_refused(scene_boxes: Scene, tmp_path: Path, lines: str) -> None:
    write_tum(scene_boxes, tmp_path)
    (tmp_path / "rgb.txt").write_text(lines)
    with pytest.raises(ValueError, match=r"rgb\.txt: "):
        open_scene(tmp_path)


def test_replica_cameras_may_lie_beside_the_scenes(scene_boxes: Scene, tmp_path: Path) -> None:
    root = tmp_path / "Replica" / "office0"
    root.mkdir(parents=True)
    write_replica(scene_boxes, root)
    shutil.move(root / "cam_params.json", root.parent / "cam_params.json")
    scene = open_scene(root)
    np.testing.assert_allclose(scene.intrinsics(0), scene_boxes.intrinsics(0))
    camera = json.loads((root.parent / "cam_params.json").read_text())["camera"]
    (root.parent / "cam_params.json").write_text(json.dumps({"camera": {**camera, "scale": 6553.5}}))
    np.testing.assert_allclose(open_scene(root).depth(0), scene_boxes.depth(0) / 6.5535, rtol=1e-6)
    (root / "traj.txt").write_text("\n".join((root / "traj.txt").read_text().splitlines()[1:]))
    with pytest.raises(ValueError, match=r"traj\.txt: has 7 poses for 8 photographs"):
        open_scene(root)
    (root.parent / "cam_params.json").unlink()
    with pytest.raises(ValueError, match=r"no cam_params\.json here or in the folder above"):
        open_scene(root)


def write_nerfstudio(scene: Scene, root: Path) -> None:
    """As `ns-process-data` does: intrinsics of each frame, depth in millimetres, poses in axes it has turned."""
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    turned = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    entries = []
    for i, name in enumerate(scene.frame_names):
        for folder in ("rgb", "depth"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image(i)).save(root / "rgb" / f"{name}.png")
        write_units(root / "depth" / f"{name}.png", scene.depth(i), 1000)
        matrix, (width, height) = scene.intrinsics(i), scene.image_size(i)
        entries.append(
            {
                "file_path": f"rgb/{name}.png",
                "depth_file_path": f"depth/{name}.png",
                "transform_matrix": (turned @ np.linalg.inv(scene.pose(i)) @ flip).tolist(),
                **{"fl_x": matrix[0, 0], "fl_y": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2]},
                **{"w": width, "h": height},
            }
        )
    meta = {"camera_model": "OPENCV", "applied_transform": turned[:3].tolist(), "frames": entries}
    (root / "transforms.json").write_text(json.dumps(meta))


def test_nerfstudio_scenes_have_depth_and_motions_of_their_own_axes(scene_boxes: Scene, tmp_path: Path) -> None:
    write_nerfstudio(scene_boxes, tmp_path)
    scene = open_scene(tmp_path)
    assert scene.format == "dl3dv" and scene.frame_names == scene_boxes.frame_names
    for i in range(1, len(scene)):
        ours, theirs = (one.pose(i) @ np.linalg.inv(one.pose(0)) for one in (scene, scene_boxes))
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
        assert np.array_equal(scene.depth(i), scene_boxes.depth(i))
        np.testing.assert_allclose(scene.intrinsics(i), scene_boxes.intrinsics(i))
    assert check_scene(scene).sound
