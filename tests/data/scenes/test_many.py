"""Finding and opening scenes costs a bounded number of calls to the file system, however many frames they have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.many_scenes import KINDS, ONE_FILE_A_FRAME, counted_calls, write_library

from gasp_fast.data.depth.survey import depth_state
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.scenes.open import open_scene

pytest.importorskip("pycolmap")
MOST_TO_FIND = 30  # calls for each scene
MOST_TO_OPEN = 80
SCENES = 5


@pytest.fixture(params=KINDS)
def libraries(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """The kind of the scenes, a library with 3 frames a scene, and one with 30."""
    for frames in (3, 30):
        write_library(request.param, tmp_path / f"of-{frames}", SCENES, frames)
    return request.param, tmp_path / "of-3", tmp_path / "of-30"


def test_finding_and_opening_scenes_takes_as_many_calls_for_few_frames_as_for_many(
    libraries: tuple[str, Path, Path],
) -> None:
    kind, *both = libraries
    open_scene(both[0] / "scene-0000")  # imports what the reader needs
    found, opened = [], []
    for library in both:
        with counted_calls() as calls:
            names = find_scenes(library)
        found.append(calls.count / SCENES)
        with counted_calls() as calls:
            entries = list(survey(library, names))
        opened.append(calls.count / SCENES)
        assert len(names) == SCENES and all(isinstance(entry, SceneEntry) for entry in entries)
    assert found[0] == found[1] <= MOST_TO_FIND
    if kind in ONE_FILE_A_FRAME:
        assert opened[1] - opened[0] <= 2 * 27  # an open file and its position; see `pack_poses`
    else:
        assert opened[0] == opened[1] <= MOST_TO_OPEN


def test_what_is_left_of_depth_takes_as_many_calls_for_few_frames_as_for_many(
    libraries: tuple[str, Path, Path],
) -> None:
    kind, *both = libraries
    counts = []
    for library in both:
        with counted_calls() as calls:
            assert depth_state(library / "scene-0000").done
        counts.append(calls.count)
    if kind not in ONE_FILE_A_FRAME:
        assert counts[0] == counts[1] <= MOST_TO_OPEN


def test_worker_processes_find_the_same_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gasp_fast.data.scenes.library as module

    write_library("vggt", tmp_path / "library", 7, 3)
    (tmp_path / "library" / "scene-0004" / "image_names.json").unlink()
    (tmp_path / "library" / "scene-0004" / "image_names.json").write_text("{")
    names = find_scenes(tmp_path / "library")
    alone = list(survey(tmp_path / "library", names))
    assert [entry.name for entry in alone if isinstance(entry, SceneEntry)] == [n for n in names if n != "scene-0004"]
    monkeypatch.setattr(module, "FEWEST_FOR_PROCESSES", 2)
    assert list(survey(tmp_path / "library", names, workers=2)) == alone
    assert replace(alone[0], name="") == replace(alone[1], name="")
