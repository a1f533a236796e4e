"""Scenes that lie elsewhere: links into stated folders are followed, and depth is kept beside read-only scenes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import run
from support.many_scenes import COMPUTED, write_library

from gasp_fast.cli import depth as depth_command
from gasp_fast.cli import scenes as scenes_command
from gasp_fast.data.scenes.computed_depth import FOLDER
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, folder_name, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.open_scenes import OpenScenes


def write_json(path: Path, **content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def linked(scene_boxes_folder: Path, tmp_path: Path) -> Path:
    """A library with one scene, whose photographs are links to files of another folder."""
    root = shutil.copytree(scene_boxes_folder, tmp_path / "library" / "boxes")
    shutil.move(root / "color", tmp_path / "photographs")
    (root / "color").mkdir()
    for path in (tmp_path / "photographs").iterdir():
        (root / "color" / path.name).symlink_to(path)
    return root.parent


def test_links_are_followed_into_the_stated_folders_only(linked: Path, tmp_path: Path, scene_boxes) -> None:
    with pytest.raises(ValueError, match=r"leads out of the scene folder .* follow_links of a library\.json"):
        open_scene(linked / "boxes")
    file = write_json(tmp_path / "library.json", scenes="library", follow_links=["photographs"])
    assert find_scenes(file) == ["boxes"] and folder_name(file / "boxes", ".") == "boxes"
    scene = open_scene(file / "boxes")
    assert np.array_equal(scene.image(0), scene_boxes.image(0))
    (entry,) = survey(file, ["boxes"])
    assert isinstance(entry, SceneEntry) and len(OpenScenes(file, entries={"boxes": entry})["boxes"]) == 8
    assert run(scenes_command, file) == 0
    (tmp_path / "other").mkdir()
    for other in ("other", "photo", str(tmp_path / "library")):
        write_json(file, scenes="library", follow_links=[other])
        with pytest.raises(ValueError, match="leads out of the scene folder"):
            open_scene(file / "boxes")
    with pytest.raises(ValueError, match="leads out of the scene folder"):  # nothing is left allowed
        open_scene(linked / "boxes")


def test_a_linked_folder_is_followed_like_a_linked_file(linked: Path, tmp_path: Path) -> None:
    shutil.rmtree(linked / "boxes" / "color")
    (linked / "boxes" / "color").symlink_to(tmp_path / "photographs")
    file = write_json(tmp_path / "library.json", scenes=str(linked), follow_links=[str(tmp_path / "photographs")])
    assert len(open_scene(file / "boxes")) == 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"root": "x"}, 'it holds {"scenes": "FOLDER"}'),
        ({"scenes": "x", "links": []}, "key 'links' is unknown; known are scenes, computed_depth, follow_links"),
        ({"scenes": "x", "follow_links": "y"}, "follow_links = 'y' is not a list of folders"),
        ({"scenes": "x", "computed_depth": 1}, "computed_depth = 1 is not a folder"),
    ],
)
def test_a_damaged_library_file_is_one_line(tmp_path: Path, content: dict, words: str) -> None:
    with pytest.raises(ValueError, match=r"library\.json: ") as caught:
        find_scenes(write_json(tmp_path / "library.json", **content))
    assert words in str(caught.value)


@pytest.fixture
def stereo(tmp_path: Path) -> Path:
    """Three scenes with stereo maps and without computed depth."""
    pytest.importorskip("pycolmap")
    write_library(COMPUTED, tmp_path / "scenes", 3, 6)
    for folder in (tmp_path / "scenes").glob(f"*/{FOLDER}"):
        shutil.rmtree(folder)
    return tmp_path / "scenes"


def test_depth_goes_beside_read_only_scenes_and_is_found_there(stereo: Path, tmp_path: Path, capsys) -> None:
    before = sorted(path.relative_to(stereo) for path in stereo.rglob("*"))
    out = tmp_path / "depth"
    assert run(depth_command, stereo, "--out", out) == 0
    assert sorted(path.relative_to(stereo) for path in stereo.rglob("*")) == before
    file = out / "library.json"
    assert f"give {file} in place of {stereo}" in capsys.readouterr().out
    scene = open_scene(file / "scene-0001")
    assert scene.has_depth and scene.frames[0].depth.path.is_relative_to(out / "scene-0001")
    assert not open_scene(stereo / "scene-0001").has_depth
    assert run(depth_command, stereo, "--out", out) == 0 and "has computed depth already" in capsys.readouterr().out
    assert run(depth_command, file, "--check") == 0
    assert run(scenes_command, file, "--jobs", 1) == 0 and capsys.readouterr().out.count("sound") == 3
    with pytest.raises(ValueError, match=r"holds depth of .*scenes; give another folder"):
        run(depth_command, stereo / "scene-0000", "--out", out)
    with pytest.raises(ValueError, match="is a library already"):
        run(depth_command, file, "--out", tmp_path / "more")


def test_a_scene_that_fails_is_named_and_the_others_go_on(stereo: Path, monkeypatch, capsys) -> None:
    original = depth_command.depth_from_mvs

    def fails(scene, frames):
        if scene.root.name == "scene-0000":
            raise RuntimeError("out of memory")
        return original(scene, frames)

    monkeypatch.setattr(depth_command, "depth_from_mvs", fails)
    assert run(depth_command, stereo) == 1
    output = capsys.readouterr().out
    assert f"failed: {stereo / 'scene-0000'}: out of memory" in output
    assert "2 of 3 scenes have depth (2 mvs); 1 have none" in output
