"""Which folders are found as scenes, and which changes of a scene change its digest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.data.scenes.library import (
    DEEPEST,
    SceneEntry,
    check_unchanged,
    find_scenes,
    scene_digest,
    survey,
)
from gasp_fast.data.scenes.open import open_scene


def place(scene: Path, at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(scene, at)


def test_scenes_are_found_in_nested_folders_in_order(scene_boxes_folder: Path, tmp_path: Path) -> None:
    for name in ("2K/f00", "1K/b17", "1K/a03", "loose"):
        place(scene_boxes_folder, tmp_path / name)
    (tmp_path / "1K" / "notes").mkdir()
    assert find_scenes(tmp_path) == ["1K/a03", "1K/b17", "2K/f00", "loose"]
    assert find_scenes(tmp_path / "1K") == ["a03", "b17"]


def test_a_scene_is_a_library_of_itself(scene_boxes_folder: Path) -> None:
    assert find_scenes(scene_boxes_folder) == ["."]
    assert isinstance(next(survey(scene_boxes_folder, ["."])), SceneEntry)


def test_scenes_inside_a_scene_or_in_hidden_folders_are_not_found(scene_boxes_folder: Path, tmp_path: Path) -> None:
    place(scene_boxes_folder, tmp_path / "outer")
    place(scene_boxes_folder, tmp_path / "outer" / "inner")
    place(scene_boxes_folder, tmp_path / ".scene-3.partial")
    assert find_scenes(tmp_path) == ["outer"]


def test_the_search_has_a_limited_depth(scene_boxes_folder: Path, tmp_path: Path) -> None:
    levels = "/".join("abcdefg"[:DEEPEST])
    place(scene_boxes_folder, tmp_path / "near" / levels)
    assert find_scenes(tmp_path / "near") == [levels]
    with pytest.raises(OSError, match=f"no scene here or up to {DEEPEST} folders below"):
        find_scenes(tmp_path)


def test_the_error_for_a_folder_without_scenes_names_the_files_of_each_format(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no scene here.*intrinsics\.txt.*transforms\.json") as caught:
        find_scenes(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        find_scenes(tmp_path / "nowhere")


def test_the_digest_depends_on_frames_their_names_their_poses_and_their_cameras(scene_boxes) -> None:
    frames = scene_boxes.frames
    moved = replace(frames[0], pose=frames[0].pose + np.eye(4, k=3) * 1e-9)
    zoomed = replace(frames[0], intrinsics=frames[0].intrinsics + np.eye(3) * 1e-9)
    sized, bent = replace(frames[0], camera_size=(7, 5)), replace(frames[0], distortion=(1e-9, 0.0, 0.0, 0.0))
    others = [frames[1:], (replace(frames[0], name="x"), *frames[1:]), frames[::-1]]
    others += [(other, *frames[1:]) for other in (moved, zoomed, sized, bent)]
    digests = {scene_digest(replace(scene_boxes, frames=tuple(other))) for other in (frames, *others)}
    assert len(digests) == 8


def test_digests_of_earlier_versions_still_tell_names_and_poses(scene_boxes) -> None:
    hashed = blake2b(digest_size=8)
    for frame in scene_boxes.frames:
        hashed.update(frame.name.encode() + b"\0" + frame.pose.astype(np.float64).tobytes())
    entry = SceneEntry("boxes", len(scene_boxes), hashed.hexdigest())
    check_unchanged(scene_boxes, entry)
    first, second, *rest = scene_boxes.frames
    with pytest.raises(ValueError, match="the scene has changed"):
        swapped = (replace(first, pose=second.pose), replace(second, pose=first.pose), *rest)
        check_unchanged(replace(scene_boxes, frames=swapped), entry)


def test_a_scene_that_is_not_what_its_entry_says_is_named_with_the_change(scene_boxes) -> None:
    entry = SceneEntry("boxes", len(scene_boxes), scene_digest(scene_boxes))
    check_unchanged(scene_boxes, entry)
    with pytest.raises(ValueError, match=r"boxes: the scene has changed \(7 frames instead of 8\)"):
        check_unchanged(replace(scene_boxes, frames=scene_boxes.frames[1:]), entry)
    first, second, *rest = scene_boxes.frames
    swapped = (replace(first, pose=second.pose), replace(second, pose=first.pose), *rest)
    with pytest.raises(ValueError, match=r"boxes: the scene has changed \(other names, poses or cameras\)"):
        check_unchanged(replace(scene_boxes, frames=swapped), entry)


def test_names_that_are_not_utf_8_have_a_digest(scene_boxes) -> None:
    odd = replace(scene_boxes.frames[0], name=b"caf\xe9".decode(errors="surrogateescape"))
    assert scene_digest(replace(scene_boxes, frames=(odd, *scene_boxes.frames[1:]))) != scene_digest(scene_boxes)


def test_a_folder_that_lacks_a_part_of_a_format_is_refused_with_what_it_has(tmp_path: Path) -> None:
    for name in ("color", "depth"):
        (tmp_path / name).mkdir()
    (tmp_path / "intrinsics.txt").write_text("")
    has = r"rgbd: color/, pose/ .*\. It has color/, depth/, intrinsics\.txt$"
    with pytest.raises(ValueError, match=f"no scene of a known format here.*{has}"):
        open_scene(tmp_path)
    with pytest.raises(OSError, match=f"no scene here.*{has}"):
        find_scenes(tmp_path)
