"""Frames out of order are noticed, although depth and poses agree as well as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import run
from support.scene_formats import write_scene_as

from gasp_fast.cli import scenes as command
from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.inspection.frame_order import order_warnings
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, without_depth


def shuffled(scene: Scene, seed: int) -> Scene:
    order = np.random.default_rng(seed).permutation(len(scene))
    return replace(scene, frames=tuple(scene.frames[i] for i in order))


@pytest.mark.parametrize("seed", range(2))
def test_shuffled_frames_are_a_warning_with_and_without_depth(scene_room: Scene, seed: int) -> None:
    assert not check_scene(scene_room).warnings and not check_scene(without_depth(scene_room)).warnings
    for scene in (shuffled(scene_room, seed), without_depth(shuffled(scene_room, seed))):
        warnings = check_scene(scene).warnings
        assert any("as far from one frame to the next as between any" in warning for warning in warnings)


def test_recorded_scenes_are_in_order_until_they_are_shuffled(scene_real: Scene) -> None:
    assert not order_warnings(scene_real, 1.0, [])
    assert order_warnings(shuffled(scene_real, 0), 1.0, [])


def test_larger_gaps_that_agree_better_are_a_warning(scene_room: Scene) -> None:
    assert not order_warnings(scene_room, 1.0, [(1, 0.9), (5, 0.94), (20, 0.5)])
    (warning,) = order_warnings(scene_room, 1.0, [(1, 0.7), (5, 0.9), (20, 0.95)])
    assert "frames 5 apart agree better (0.90) than frames 1 apart (0.70)" in warning


def test_a_list_in_the_order_of_characters_is_doubtful(scene_room: Scene, tmp_path: Path, capsys) -> None:
    """`vggt` names its frames in a list, whose order is that of the frames."""
    named = replace(scene_room, frames=tuple(replace(frame, name=str(k)) for k, frame in enumerate(scene_room.frames)))
    write_scene_as("vggt", replace(named, frames=tuple(sorted(named.frames, key=lambda frame: frame.name))), tmp_path)
    assert open_scene(tmp_path).frame_names[:4] == ["0", "1", "10", "11"]
    assert run(command, tmp_path, "--json", tmp_path / "found.json") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "doubtful" in output and "in the order of the characters of their names, 15 before 2" in output
    assert json.loads((tmp_path / "found.json").read_text())["scenes"][0]["warnings"]
