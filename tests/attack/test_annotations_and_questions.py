"""Damaged annotations and lists of questions are read as they were, or refused in one line that names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.damaged_scenes import damage_bytes, damage_json, replace_file

from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.shard import shard_arrays, shard_bytes, shard_path
from gasp_fast.data.questions.scene_frames import FrameReader, SceneFrames
from gasp_fast.data.questions.video_qa import VideoQA, record_json
from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.sequences import SequenceConfig

TRIES = 300  # of each kind


def write_annotations(folder: Path) -> Path:
    scenes = (SceneEntry("a", 30, "0"), SceneEntry("b", 40, "1"))
    settings = AnnotationSettings(scenes=scenes, sequences=SequenceConfig(per_scene=2), shard_size=4)
    store_settings(folder, settings)
    uv = np.random.default_rng(0).random((3, 8, 2))
    tracks = Tracks(np.arange(8), uv[:, 0], uv, uv[..., 0] > 0.5, uv[..., 1])
    shard_path(folder, 0).write_bytes(shard_bytes(shard_arrays([0, 0, 1, 1], [tracks] * 4), settings.digest, {}))
    return shard_path(folder, 0)


def write_settings(folder: Path) -> Path:
    return write_annotations(folder).with_name("plan.json")


def use_annotations(folder: Path) -> list[object]:
    reader = AnnotationReader(folder)
    reader.check_complete()
    return [reader[index].tracks.uv.tolist() for index in range(min(len(reader), 4))]


def write_questions(folder: Path) -> Path:
    records = [record_json(str(i), ("<image>\nq", "a", "b", "c"), "s", "v.mp4") for i in range(3)]
    (folder / "qa.json").write_text(json.dumps(records))
    return folder / "qa.json"


def use_questions(folder: Path) -> list[object]:
    data = VideoQA(folder)
    for index in range(len(data)):
        data.record(index), data.name(index), data.video_path(index)
    return []


def write_questions_about_frames(folder: Path) -> Path:
    frames = SceneFrames("1K/a", "00ff", (3, 1, 2), (0.0, 0.0, 96.0, 72.0))
    (folder / "qa.json").write_text(json.dumps([record_json(str(i), ("q", "a"), "s", frames) for i in range(3)]))
    return folder / "qa.json"


def use_questions_about_frames(folder: Path) -> list[object]:
    data = VideoQA(folder, reader=FrameReader(folder / "scenes"))
    for index in range(len(data)):
        with suppress(FileNotFoundError):  # of the scene, which is not there
            data.sample(index)
    return []


@pytest.mark.parametrize(
    ("write", "use"),
    [
        (write_annotations, use_annotations),
        (write_settings, use_annotations),
        (write_questions, use_questions),
        (write_questions_about_frames, use_questions_about_frames),
    ],
    ids=["shards", "settings", "questions", "questions about frames"],
)
def test_damage_is_refused_in_one_line_or_changes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], Path],
    use: Callable[[Path], list[object]],
) -> None:
    draw, failures, refused = random.Random(write.__name__), [], 0
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    whole = use(folder)
    for number in range(TRIES):
        shutil.rmtree(folder)
        folder.mkdir()
        path = write(folder)
        ways = [damage_bytes, damage_bytes, replace_file, *[damage_json] * (3 if path.suffix == ".json" else 0)]
        how = draw.choice(ways)(path, draw)
        try:
            if use(folder) != whole:
                failures.append(f"{number} {how}: other content")
        except (OSError, ValueError) as error:
            text, refused = str(error), refused + 1
            if "\n" in text or str(folder) not in text or len(text) > 1000:
                failures.append(f"{number} {how}: {text[:300]}")
    with capsys.disabled():
        print(f" {write.__name__}: {TRIES} tries, {len(failures)} failures, {refused} refused")
    assert not failures, "\n".join(failures)
    assert refused > 0.3 * TRIES
