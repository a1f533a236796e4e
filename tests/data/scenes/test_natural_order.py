"""Frames are in the order of the numbers in their names, whether these are padded with zeros or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.box_world import CAMERA, BoxWorld
from support.scene_formats import WRITERS, write_scene_as

from gasp_fast.data.depth.survey import depth_state
from gasp_fast.data.scenes.computed_depth import DepthIndex, write_index
from gasp_fast.data.scenes.library import SceneEntry, check_unchanged, in_order_of_characters, scene_digest
from gasp_fast.data.scenes.natural_order import natural_key
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, without_depth
from gasp_fast.data.tracks.build import build_tracks

FRAMES = 12


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    small = BoxWorld(frames=FRAMES, camera=CAMERA / 4 + np.diag([0, 0, 3 / 4]), size=(90, 54))
    return open_scene(small.write_rgbd(tmp_path_factory.mktemp("padded") / "scene"))


@pytest.fixture
def unpadded(padded: Scene) -> Scene:
    """The same scene, its frames named 0, 1, ... 11."""
    frames = (replace(frame, name=str(number)) for number, frame in enumerate(padded.frames))
    return replace(padded, frames=tuple(frames))


@pytest.mark.parametrize(
    "names",
    [
        ["1", "2", "10", "100"],
        ["a9/b9", "a9/b10", "a10/b1"],
        ["0001", "0002", "0010"],
        ["frame", "frame-1", "frame-1b", "frame-2"],
        ["01", "1", "2"],
        ["9" * 5000, "1" + "0" * 5000],
    ],
)
def test_numbers_in_names_count_as_numbers(names: list[str]) -> None:
    assert sorted(sorted(names, reverse=True), key=natural_key) == names


@pytest.mark.parametrize("format", WRITERS)
def test_a_scene_with_unpadded_names_has_the_tracks_of_its_padded_twin(
    format: str, padded: Scene, unpadded: Scene, tmp_path: Path
) -> None:
    write_scene_as(format, unpadded, tmp_path)
    twin = open_scene(tmp_path)
    assert twin.format == format and twin.frame_names == [str(number) for number in range(FRAMES)]
    frames = [1, 0, 2, 9, 10, 11]
    ours, theirs = build_tracks(twin, frames), build_tracks(padded, frames)
    assert len(ours) > 8
    assert np.array_equal(ours.query, theirs.query) and np.array_equal(ours.visible, theirs.visible)
    np.testing.assert_allclose(ours.uv, theirs.uv, atol=1e-9)


def test_annotations_of_the_order_of_characters_are_refused(unpadded: Scene) -> None:
    earlier = in_order_of_characters(unpadded)
    assert earlier.frame_names[:4] == ["0", "1", "10", "11"]
    entry = SceneEntry("scene", FRAMES, scene_digest(earlier))
    check_unchanged(earlier, entry)
    with pytest.raises(ValueError, match=r"frame 2 now comes before frame 10.*make its annotations again"):
        check_unchanged(unpadded, entry)


def test_computed_depth_of_the_order_of_characters_is_kept(unpadded: Scene, tmp_path: Path) -> None:
    write_scene_as("rgbd", without_depth(unpadded), tmp_path)
    scene = open_scene(tmp_path)
    write_index(
        tmp_path / "computed_depth", DepthIndex(source="mvs", scene=scene_digest(in_order_of_characters(scene)))
    )
    assert depth_state(tmp_path).done
