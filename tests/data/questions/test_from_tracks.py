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
from support.exact_scene import exact_tracks
from support.families import Family

from gasp_fast.cli import make_vqa as command
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.questions.from_tracks import (
    KINDS,
    LEAST_DEPTH_RATIO,
    LEAST_DISTANCE,
    TrackTable,
    View,
    VQAConfig,
    draw_questions,
    make_vqa,
)
from gasp_fast.data.questions.scene_frames import FrameReader
from gasp_fast.data.questions.video_qa import VideoQA
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, render_scenes
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.sequences import SequenceConfig, is_held_out

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
    return TrackTable.of(tracks, [(0, 0, 640, 400)] * 10)


CHOICE = re.compile(r"([A-D]) \[(\d+), (\d+)\]")


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


def read_records(folder: Path, library: Path, held_out: float = 0.0) -> VideoQA:
    return VideoQA(folder, reader=FrameReader(library, held_out))


@pytest.mark.parametrize("order", ["anchor_first", "chronological"])
def test_as_many_records_as_sequences_with_the_pixels_of_their_frames(
    library: Path, cache: AnnotationReader, tmp_path: Path, order: str
) -> None:
    list(make_vqa(library, cache.folder, tmp_path, VQAConfig(order=order)))
    data = read_records(tmp_path, library)
    assert len(data) == len(cache) == 20
    for index in range(len(data)):
        sample, frames = data.sample(index), cache[index].tracks.frames.tolist()
        assert sample.record.id == f"{index:08d}" and len(sample.record.turns) == 8
        assert f"These are {len(frames)} images" in sample.record.turns[0].text
        scene = open_scene(library / cache[index].scene)
        frames = sorted(frames) if order == "chronological" else frames
        assert np.array_equal(sample.frames, [scene.image(frame) for frame in frames])


def test_records_follow_the_schema(vqa_folder: Path) -> None:
    for path in sorted(vqa_folder.glob("*.json")):
        for record in json.loads(path.read_text()):
            assert set(record) == {"id", "conversations", "data_source", "images"}
            talk = record["conversations"]
            assert [turn["from"] for turn in talk] == ["human", "gpt"] * 4
            assert talk[0]["value"].startswith("<image>\n")
            assert sum("<image>" in turn["value"] for turn in talk) == 1


CROP = (20.0, 5.0, 70.0, 67.0)  # of frames of 96 x 72


def cropped(width: int, height: int) -> tuple[float, float, float, float]:
    assert (width, height) == (CONFIG.width, CONFIG.height)
    return CROP


@pytest.mark.parametrize("order", ["anchor_first", "chronological"])
@pytest.mark.parametrize("seen", [(0.0, 0.0, 96.0, 72.0), CROP], ids=["whole", "crop"])
def test_positions_and_visibility_are_those_of_the_scene_in_what_is_seen(
    library: Path, cache: AnnotationReader, tmp_path: Path, order: str, seen: tuple[float, ...]
) -> None:
    """Compares the texts with the exact geometry of the scene, without the track table."""
    view = View("cropping", cropped) if seen == CROP else View()
    list(make_vqa(library, cache.folder, tmp_path, VQAConfig(order=order, turns=12), view=view))
    data, answers, errors = read_records(tmp_path, library), Counter(), []
    left_top, right_bottom = np.array(seen[:2]), np.array(seen[2:])
    for index in range(len(data)):
        record = data.record(index)
        tracks, scene = cache[int(record.id)].tracks, make_scene(int(record.about.scene[-6:]), CONFIG)
        assert record.about.seen == seen and set(record.about.frames) == set(tracks.frames.tolist())
        anchor = record.about.frames.index(int(tracks.frames[0]))
        for question, answer in zip(record.turns[::2], record.turns[1::2], strict=True):
            kind = re.search(r"Where does|Can it be seen", question.text)
            if kind is None:
                continue
            place = re.search(r"\[(\d+), (\d+)\] in image (\d+)", question.text)
            assert place is not None and int(place[3]) == anchor + 1
            query = left_top + np.array([int(place[1]), int(place[2])]) / 1000 * (right_bottom - left_top)
            near = np.linalg.norm(tracks.query - query, axis=1)
            assert near.min() < 0.1
            frames = [record.about.frames[anchor], record.about.frames[image_of(question.text)]]
            exact = exact_tracks(scene, frames, tracks.query[near.argmin()][None], tolerance=0.05)
            uv, margin = exact.uv[0, 1], 1.5  # half a pixel of depth grid on small images, and rounding
            if kind[0] == "Where does":
                found = left_top + np.array(places(answer.text)[0]) / 1000 * (right_bottom - left_top)
                errors.append(np.abs(found - uv).max())
            elif answer.text == "Yes":
                assert (uv > left_top - margin).all() and (uv < right_bottom + margin).all()
            answers[answer.text, bool(((uv > left_top) & (uv < right_bottom)).all())] += 1
    assert len(errors) >= 15 and np.mean(np.array(errors) < margin) > 0.97  # the others are at the edge of a box
    assert answers["Yes", True] > 5 and answers["No", True] + answers["No", False] > 5
    assert (answers["No", False] > 5) or seen != CROP


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


def test_the_chosen_letter_is_at_the_right_place_and_no_other_is_near(table: TrackTable) -> None:
    turns = questions_of(table, "choose", 300)
    for turn in turns:
        track, image = track_at(table, places(turn.question)[0]), image_of(turn.question)
        choices = {letter: np.array([int(x), int(y)]) for letter, x, y in CHOICE.findall(turn.question)}
        assert list(choices) == ["A", "B", "C", "D"]
        np.testing.assert_array_equal(choices[turn.answer], table.position[track, image])
        for letter, place in choices.items():
            others = [np.hypot(*(place - other)) for name, other in choices.items() if name != letter]
            assert min(others) >= LEAST_DISTANCE
    counts = Counter(turn.answer for turn in turns)
    assert min(counts.values()) > 50


def test_the_kinds_take_turns(table: TrackTable) -> None:
    for seed in range(50):
        turns = draw_questions(table, np.random.default_rng(seed), 8)
        kinds = Counter(turn.kind for turn in turns)
        assert len(turns) == 8 and set(kinds) == set(KINDS) and max(kinds.values()) <= 4
        assert len({turn.question for turn in turns}) == 8


def test_a_single_track_still_gives_questions() -> None:
    uv = np.array([[[10.0, 10.0], [20.0, 20.0]]])
    tracks = Tracks(np.arange(2), uv[:, 0], uv, np.ones((1, 2), bool), np.ones((1, 2)))
    turns = draw_questions(TrackTable.of(tracks, [(0, 0, 100, 100)] * 2), np.random.default_rng(0), 4)
    assert {turn.kind for turn in turns} == {"point", "choose", "visible"}


def test_positions_are_per_mille_of_what_is_seen_and_what_is_cut_off_is_not_asked_about() -> None:
    uv = np.array([[[320.0, 100], [640, 100]], [[320, 100], [1100, 100]], [[90, 100], [640, 100]]])
    tracks = Tracks(np.arange(2), uv[:, 0], uv, np.ones((3, 2), bool), np.ones((3, 2)))
    table = TrackTable.of(tracks, [(0, 0, 640, 400), (0, 0, 1280, 400)])
    np.testing.assert_array_equal(table.position[0], [[500, 250], [500, 250]])
    table = TrackTable.of(tracks, [(100, 50, 500, 250), (200, 0, 1000, 400)])
    np.testing.assert_array_equal(table.position[0], [[550, 250], [550, 250]])
    np.testing.assert_array_equal(table.visible, [[True, True], [True, False]])  # of the first two


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


def test_the_command_names_what_it_omits_and_sees_what_the_model_sees(
    cache: AnnotationReader, tmp_path: Path, shipped: Family, capsys
) -> None:
    library, out = tmp_path / "library", tmp_path / "out"
    list(render_scenes(library, 2, config=CONFIG))
    for path in (library / "scene-000001" / "color").iterdir():
        path.write_bytes(b"no image")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [str(library), "--tracks", str(cache.folder), "--model", str(shipped.folder), "--out", str(out)]
    assert command.run(parser.parse_args([*words, "--workers", "1", "--turns", "1"])) == 0
    text = capsys.readouterr().out
    assert "10 records of 20 sequences" in text
    assert "omitted: 10 scene-000001: scene-000001/color/" in text
    data = read_records(out, library)
    assert len(data) == 10
    cut = (12.0, 0.0, 84.0, 72.0) if "llava" in shipped.backbone.model_type else (0.0, 0.0, 96.0, 72.0)
    assert data.record(0).about.seen == pytest.approx(cut, abs=0.5)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"turns": 0}, "turns = 0"), ({"turns": 10**9}, "1 to 64"), ({"order": "any"}, "order = 'any' is unknown")],
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


def test_a_scene_that_changed_after_its_questions_is_not_read(
    library: Path, vqa_folder: Path, cache: AnnotationReader, tmp_path: Path
) -> None:
    changed = shutil.copytree(library, tmp_path / "library")
    poses = sorted((changed / "scene-000001" / "pose").iterdir())
    poses[0].write_bytes(poses[1].read_bytes())
    data = read_records(vqa_folder, changed)
    assert len(data.sample(0).frames) > 1
    with pytest.raises(ValueError, match="scene-000001: the scene has changed; make its questions again"):
        data.sample(10)


def test_records_of_scenes_that_are_held_out_are_left_out(library: Path, vqa_folder: Path) -> None:
    share = next(n / 64 for n in range(64) if 0 < sum(is_held_out(f"scene-{i:06d}", n / 64) for i in range(2)) < 2)
    data = read_records(vqa_folder, library, share)
    assert len(data) == 10 and not data.skipped
    assert not any(is_held_out(data.record(index).about.scene, share) for index in range(10))
    with pytest.raises(ValueError, match="all are about scenes that are held out"):
        read_records(vqa_folder, library, 1.0)
