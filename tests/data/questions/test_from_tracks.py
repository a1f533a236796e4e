"""The fairness baseline has the same sequences and tracks, true answers that cannot be guessed, and one schema."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.exact_scene import exact_tracks

from gasp_fast.cli import make_vqa as command
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.questions.from_tracks import (
    KINDS,
    LEAST_DEPTH_RATIO,
    LEAST_DISTANCE,
    TrackTable,
    VQAConfig,
    draw_marks,
    draw_questions,
    make_vqa,
)
from gasp_fast.data.questions.video_qa import VideoQA
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, render_scenes
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.data.video.read import read_video

CONFIG = SyntheticConfig(frames=12, width=96, height=72, samples=1)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    list(render_scenes(folder, 2, config=CONFIG))
    return folder


@pytest.fixture(scope="module")
def cache(library: Path, tmp_path_factory: pytest.TempPathFactory) -> AnnotationReader:
    folder = tmp_path_factory.mktemp("tracks")
    entries = [entry for entry in survey(library, find_scenes(library)) if isinstance(entry, SceneEntry)]
    config = SequenceConfig(min_frames=4, max_frames=8, per_scene=10)
    list(annotate(library, folder, AnnotationSettings(scenes=tuple(entries), sequences=config, shard_size=7)))
    return AnnotationReader(folder)


@pytest.fixture(scope="module")
def vqa_folder(library: Path, cache: AnnotationReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vqa")
    assert list(make_vqa(library, cache.folder, out)) == [0, 1, 2]
    return out


@pytest.fixture(scope="module")
def table() -> TrackTable:
    """Random tracks: 40 points in 10 images of 640 x 400."""
    draw = np.random.default_rng(0)
    uv = draw.uniform([0, 0], [640, 400], (40, 10, 2))
    visible = draw.random((40, 10)) < 0.6
    visible[:, 0] = True
    tracks = Tracks(np.arange(10), uv[:, 0], uv, visible, draw.uniform(1, 5, (40, 10)))
    return TrackTable.of(tracks, np.full((10, 2), (640, 400)))


def questions_of(table: TrackTable, kind: str, times: int) -> list:
    turns = [KINDS[kind](table, np.random.default_rng(seed)) for seed in range(times)]
    return [turn for turn in turns if turn is not None]


def places(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, found)) for found in re.findall(r"\[(\d+), (\d+)\]", text)]


def image_of(question: str) -> int:
    """The image (from 0) of a question: the last one in its text."""
    return int(re.findall(r"image (\d+)", question)[-1]) - 1


def track_at(table: TrackTable, place: tuple[int, ...]) -> int:
    found = np.flatnonzero((table.position[:, 0] == place).all(axis=1))
    assert len(found) == 1
    return int(found[0])


def test_as_many_records_as_sequences_with_the_same_frames(
    library: Path, cache: AnnotationReader, vqa_folder: Path
) -> None:
    data = VideoQA(vqa_folder)
    assert len(data) == len(cache) == 20
    for index in range(len(data)):
        sample = data.sample(index, frames=64)
        assert sample.record.id == f"{index:08d}"
        frames = cache[index].tracks.frames
        assert len(sample.frames) == len(frames)
        assert f"shows {len(frames)} images" in sample.record.turns[0].text
        assert len(sample.record.turns) == 8
    scene = make_scene(1, CONFIG)
    unmarked = [i for i in range(10, 20) if "REF" not in str(data.record(i))] or [19]
    last = data.sample(unmarked[0], frames=64).frames[-1].astype(int)
    assert np.abs(last - scene.render(int(cache[unmarked[0]].tracks.frames[-1])).image).mean() < 12


def test_records_follow_the_schema(vqa_folder: Path) -> None:
    for path in sorted(vqa_folder.glob("*.json")):
        for record in json.loads(path.read_text()):
            assert set(record) == {"id", "conversations", "data_source", "video"}
            talk = record["conversations"]
            assert [turn["from"] for turn in talk] == ["human", "gpt"] * 4
            assert talk[0]["value"].startswith("<image>\n")
            assert sum("<image>" in turn["value"] for turn in talk) == 1


def test_a_position_in_an_answer_is_where_the_scene_has_it(cache: AnnotationReader, vqa_folder: Path) -> None:
    """Compares the text with the exact geometry of the scene, without the track table."""
    data, checked = VideoQA(vqa_folder), 0
    size = np.array([CONFIG.width, CONFIG.height])
    for index in range(len(data)):
        annotation, turns = cache[index], data.record(index).turns
        scene = make_scene(int(annotation.scene[-6:]), CONFIG)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if "Where does the same point lie" in question.text:
                query = np.array(places(question.text)[-1]) / 1000 * size
                near = np.linalg.norm(annotation.tracks.query - query, axis=1)
                assert near.min() < 0.1
                exact = exact_tracks(
                    scene, annotation.tracks.frames.tolist(), annotation.tracks.query[near.argmin()][None]
                )
                error = np.array(places(answer.text)[0]) / 1000 * size - exact.uv[0, image_of(question.text)]
                assert np.abs(error).max() < 1.5  # half a pixel of depth grid on small images, and rounding
                checked += 1
    assert checked >= 15


def test_point_answers_are_the_tracks(table: TrackTable) -> None:
    for turn in questions_of(table, "point", 100):
        track, image = track_at(table, places(turn.question)[0]), image_of(turn.question)
        assert table.visible[track, image]
        assert places(turn.answer) == [tuple(table.position[track, image])]


def test_visibility_answers_are_the_tracks_and_balanced(table: TrackTable) -> None:
    turns = questions_of(table, "visible", 300)
    for turn in turns:
        track, image = track_at(table, places(turn.question)[0]), image_of(turn.question)
        assert (turn.answer == "Yes") == table.visible[track, image]
    assert 0.4 < np.mean([turn.answer == "Yes" for turn in turns]) < 0.6


def test_the_nearer_point_is_nearer_by_a_margin_in_the_named_image(table: TrackTable) -> None:
    turns = questions_of(table, "nearer", 300)
    for turn in turns:
        image = image_of(turn.question)
        first, second = (table.depth[track_at(table, place), image] for place in places(turn.question))
        assert turn.answer == ("A" if first < second else "B")
        assert max(first, second) / min(first, second) > LEAST_DEPTH_RATIO
    assert 0.35 < np.mean([turn.answer == "A" for turn in turns]) < 0.65


def test_the_chosen_letter_marks_the_right_place_and_no_other_is_near(table: TrackTable) -> None:
    turns = questions_of(table, "choose", 300)
    for turn in turns:
        image = image_of(turn.question)
        assert set(turn.marks) == {0, image}
        track = track_at(table, tuple(turn.marks[0]["REF"]))
        marks = turn.marks[image]
        assert list(marks) == ["A", "B", "C", "D"]
        np.testing.assert_array_equal(marks[turn.answer], table.position[track, image])
        for letter, place in marks.items():
            others = [np.hypot(*(place - other)) for name, other in marks.items() if name != letter]
            assert min(others) >= LEAST_DISTANCE
    counts = Counter(turn.answer for turn in turns)
    assert min(counts.values()) > 50


def test_kinds_alternate_and_marks_are_drawn_once(table: TrackTable) -> None:
    for seed in range(50):
        turns = draw_questions(table, np.random.default_rng(seed), 6)
        kinds = Counter(turn.kind for turn in turns)
        assert len(turns) == 6 and kinds["choose"] == 1 and set(kinds) == set(KINDS)
        assert len({turn.question for turn in turns}) == 6


def test_a_single_track_still_gives_questions() -> None:
    uv = np.array([[[10.0, 10.0], [20.0, 20.0]]])
    tracks = Tracks(np.arange(2), uv[:, 0], uv, np.ones((1, 2), bool), np.ones((1, 2)))
    turns = draw_questions(TrackTable.of(tracks, np.full((2, 2), 100)), np.random.default_rng(0), 4)
    assert {turn.kind for turn in turns} == {"point", "choose", "visible"}


def test_coordinates_are_per_mille_of_each_axis() -> None:
    uv = np.array([[[320.0, 100.0], [640.0, -7.0]]])
    tracks = Tracks(np.arange(2), uv[:, 0], uv, np.ones((1, 2), bool), np.ones((1, 2)))
    table = TrackTable.of(tracks, np.array([[640, 400], [1280, 400]]))
    np.testing.assert_array_equal(table.position, [[[500, 250], [500, 0]]])


def test_marks_change_the_image_only_near_them() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    marked = draw_marks(image, {"A": np.array([500, 250]), "B": np.array([100, 900])})
    y, x = np.nonzero((marked != image).any(axis=2))
    near = [np.hypot(x - cx, y - cy) < 30 for cx, cy in ((150, 50), (30, 180))]
    assert np.all(near[0] | near[1]) and near[0].sum() > 50 and near[1].sum() > 50
    assert (image == 128).all()


def test_bytes_do_not_depend_on_interruptions_or_processes(
    library: Path, cache: AnnotationReader, vqa_folder: Path, tmp_path
):
    interrupted = make_vqa(library, cache.folder, tmp_path)
    next(interrupted)
    interrupted.close()
    assert sorted(path.name for path in tmp_path.glob("records-*")) == ["records-00000.json"]
    assert sorted(make_vqa(library, cache.folder, tmp_path, workers=2)) == [0, 1, 2]
    files = sorted(path.relative_to(vqa_folder) for path in vqa_folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((vqa_folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_other_settings_do_not_mix_into_one_folder(library: Path, cache: AnnotationReader, vqa_folder: Path) -> None:
    with pytest.raises(ValueError, match="other settings"):
        next(make_vqa(library, cache.folder, vqa_folder, VQAConfig(turns=2)))


def test_the_command_shrinks_clips_and_names_what_it_omits(cache: AnnotationReader, tmp_path: Path, capsys) -> None:
    library, out = tmp_path / "library", tmp_path / "out"
    list(render_scenes(library, 2, config=CONFIG))
    for path in (library / "scene-000001" / "color").iterdir():
        path.write_bytes(b"no image")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [str(library), "--tracks", str(cache.folder), "--out", str(out), "--longest-side", "48", "--workers", "1"]
    assert command.run(parser.parse_args([*words, "--turns", "1"])) == 0
    text = capsys.readouterr().out
    assert "10 records of 20 sequences" in text
    assert "omitted: 10 scene-000001: scene-000001/color/" in text
    data = VideoQA(out)
    assert len(data) == 10 and data.sample(0, frames=4).frames.shape[1:] == (36, 48, 3)


def test_frames_of_a_clip_are_untouched_where_nothing_is_marked(
    library: Path, vqa_folder: Path, cache: AnnotationReader
) -> None:
    records = {r["id"]: r for path in vqa_folder.glob("*.json") for r in json.loads(path.read_text())}
    record = records["00000000"]
    frames = read_video(vqa_folder / record["video"], 64).astype(int)
    talk = str(record["conversations"])
    named = {0, int(re.findall(r"in image (\d+) is the same point", talk)[0]) - 1} if "REF" in talk else set()
    for place, frame in enumerate(cache[0].tracks.frames):
        source = np.asarray(Image.open(library / cache[0].scene / "color" / f"{frame:06d}.jpg")).astype(int)
        changed = np.mean(np.abs(frames[place] - source).max(axis=2) > 60)
        assert (changed > 0.003) == (place in named)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"turns": 0}, "turns = 0"), ({"turns": 10**9}, "1 to 64"), ({"longest_side": 3}, "longest_side = 3")],
)
def test_bad_settings_are_named(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VQAConfig(**change)


def test_a_scene_that_changed_after_its_annotation_gives_no_questions(
    library: Path, cache: AnnotationReader, tmp_path: Path
) -> None:
    changed = shutil.copytree(library, tmp_path / "library")
    poses = sorted((changed / "scene-000001" / "pose").iterdir())
    poses[0].write_bytes(poses[1].read_bytes())
    list(make_vqa(changed, cache.folder, tmp_path / "out"))
    omitted = [line for path in (tmp_path / "out").glob("omitted-*") for line in path.read_text().splitlines()]
    assert len(omitted) == 10
    assert all("scene-000001: the scene has changed (other names, poses or cameras)" in line for line in omitted)
