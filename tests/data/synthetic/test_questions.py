"""The answers are true and balanced, the questions are clear, the schema is right, and the bytes are reproducible."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.exact_scene import rays, trace

from gasp_fast.cli import render as command
from gasp_fast.data.scenes.library import find_scenes
from gasp_fast.data.synthetic.questions import (
    CHOOSE,
    KINDS,
    SceneFacts,
    SceneQuestion,
    question_record,
    questions_about,
    read_facts,
    write_qa,
)
from gasp_fast.data.synthetic.scenes import SyntheticConfig, SyntheticScene, make_scene, render_scenes
from gasp_fast.data.video.read import read_video

CONFIG = SyntheticConfig(width=64, height=64, samples=1)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(render_scenes(tmp_path_factory.mktemp("scenes"), 16, config=CONFIG))


@pytest.fixture(scope="module")
def questions_of_scenes(rendered: list[Path]) -> list[tuple[SyntheticScene, SceneFacts, dict[str, SceneQuestion]]]:
    found = []
    for seed, folder in enumerate(rendered):
        facts = read_facts(folder)
        found.append((make_scene(seed, CONFIG), facts, {q.kind: q for q in questions_about(facts)}))
    return found


def seen_boxes(scene: SyntheticScene, frame: int) -> dict[int, tuple[float, float]]:
    """Distance to the nearest visible point of each box and its mean column, by ray casting."""
    y, x = np.mgrid[: scene.config.height, : scene.config.width] + 0.5
    origins, directions = rays(scene, frame, np.stack([x.ravel(), y.ravel()], axis=-1))
    distance, surface = trace(scene, origins, directions)
    metres, box = distance * np.linalg.norm(directions, axis=1), surface // 6 - 1
    return {
        b: (metres[box == b].min(), x.ravel()[box == b].mean()) for b in range(len(scene.boxes)) if np.any(box == b)
    }


def named(scene: SyntheticScene, text: str) -> list[int]:
    """The boxes whose colours appear in a text, in order of appearance."""
    places = [(text.find(box.colour), number) for number, box in enumerate(scene.boxes) if box.colour in text]
    return [number for _, number in sorted(places)]


def test_the_nearer_box_is_nearer_by_ray_casting(questions_of_scenes) -> None:
    checked = 0
    for scene, _, questions in questions_of_scenes:
        if "nearer" in questions:
            depths = {box: depth for box, (depth, _) in seen_boxes(scene, 0).items()}
            pair = named(scene, questions["nearer"].text)
            assert named(scene, questions["nearer"].answer) == [min(pair, key=depths.__getitem__)]
            checked += 1
    assert checked >= 4


def test_counts_are_the_boxes_that_rays_hit(questions_of_scenes) -> None:
    checked = 0
    for scene, _, questions in questions_of_scenes:
        if "count" in questions:
            hit = set().union(*(seen_boxes(scene, frame) for frame in range(0, 32, 3)))
            assert int(questions["count"].answer) == len(hit)
            checked += 1
    assert checked >= 8


def test_the_turn_follows_from_the_motion_of_the_view(questions_of_scenes) -> None:
    """When the camera turns left, what was straight ahead moves to the right in the image."""
    checked = 0
    for scene, _, questions in questions_of_scenes:
        if "turn" in questions:
            turned = 0.0
            for before, after in zip(scene.camera_to_world[:-1], scene.camera_to_world[1:], strict=True):
                ahead = (after[:3, :3].T @ before[:3, 2])[[0, 2]]  # the old viewing direction in the new camera
                turned += np.degrees(np.arctan2(*ahead))  # positive: it moved to the right
            assert questions["turn"].answer == ("To the left" if turned > 0 else "To the right")
            checked += 1
    assert checked >= 8


def test_left_and_right_are_those_of_the_image(questions_of_scenes) -> None:
    checked = 0
    for scene, _, questions in questions_of_scenes:
        if "beside" in questions:
            seen = seen_boxes(scene, 0)
            first, second = (seen[box][1] for box in named(scene, questions["beside"].text))
            assert questions["beside"].answer == ("To the left" if first < second else "To the right")
            checked += 1
    assert checked >= 4


def test_every_kind_occurs_and_no_answer_can_be_guessed(questions_of_scenes) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, _, questions in questions_of_scenes:
        for kind, question in questions.items():
            answers[kind][question.answer] += 1
            assert not question.options or question.answer in question.options
            assert len(set(question.options)) == len(question.options)
    assert len(answers) == len(KINDS)
    for kind, counts in answers.items():
        assert max(counts.values()) / sum(counts.values()) < 0.75, (kind, counts)


def test_a_choice_names_its_letter() -> None:
    question = SceneQuestion("turn", "Which way?", "To the right", ("To the left", "To the right"))
    choice = question_record("x", question, "x.mp4", choice=True)["conversations"]
    assert choice[0]["value"] == f"<image>\nWhich way?\nA. To the left.\nB. To the right.\n{CHOOSE}"
    assert choice[1]["value"] == "B. To the right."
    free = question_record("x", question, "x.mp4", choice=False)["conversations"]
    assert [turn["value"] for turn in free] == ["<image>\nWhich way?", "To the right."]


def test_records_follow_the_schema_and_their_clips_play(rendered: list[Path], tmp_path: Path) -> None:
    list(write_qa(rendered[:3], tmp_path))
    records = json.loads((tmp_path / "qa.json").read_text())
    assert len({record["id"] for record in records}) == len(records) >= 9
    for record in records:
        assert set(record) == {"id", "conversations", "data_source", "video"}
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
        assert record["conversations"][0]["value"].startswith("<image>\n")
    for folder in rendered[:3]:
        video = read_video(tmp_path / f"{folder.name}.mp4", 32)
        assert video.shape == (32, 64, 64, 3)
        first = make_scene(int(folder.name[-6:]), CONFIG).render(0).image
        assert np.abs(video[0].astype(int) - first).mean() < 15


def test_the_same_scenes_give_the_same_bytes(rendered: list[Path], tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        list(write_qa(rendered[:3], tmp_path / name, workers))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_command_writes_scenes_and_questions_side_by_side(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--out", str(tmp_path), "--scenes", "2", "--frames", "4", "--size", "48", "--workers", "1"]
    assert command.run(parser.parse_args(words)) == 0
    assert find_scenes(tmp_path) == ["scene-000000", "scene-000001"]
    assert (tmp_path / "qa" / "qa.json").exists() and len(list((tmp_path / "qa").glob("*.mp4"))) == 2
    assert command.run(parser.parse_args([*words[:1], str(tmp_path / "bare"), *words[2:], "--no-qa"])) == 0
    assert not (tmp_path / "bare" / "qa").exists()


def test_a_folder_that_is_no_synthetic_scene_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="not a synthetic scene"):
        read_facts(tmp_path)


@pytest.mark.parametrize("meta", ["[]", '{"boxes": 3}', '{"boxes": [1], "color_wh": [48, 48], "name": "a", "seed": 0}'])
def test_a_damaged_description_of_a_scene_is_one_line(tmp_path: Path, meta: str) -> None:
    (tmp_path / "meta.json").write_text(meta)
    (tmp_path / "pose").mkdir()
    with pytest.raises((ValueError, OSError), match=str(tmp_path)) as caught:
        read_facts(tmp_path)
    assert "\n" not in str(caught.value)
