"""Promises about `gasp-fast scenes`: sound scenes pass, convention mistakes are named, the picture is worth a look."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from gasp_fast.cli import scenes as command
from gasp_fast.data.inspection.check import check_scene
from gasp_fast.data.inspection.picture import draw_tracks
from gasp_fast.data.scenes.formats import format_named
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, rigid_inverse

RECORDED = ("hololens_dvmvs_a", "apc_shelf_glue")
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def mistaken(scene: Scene, pose=lambda p: p, scale: float = 1.0) -> Scene:
    """The scene as it would be read with a wrong idea of its poses or its depth scale."""
    return replace(
        scene,
        frames=tuple(
            replace(frame, pose=pose(frame.pose), depth=replace(frame.depth, scale=frame.depth.scale * scale))
            for frame in scene.frames
        ),
    )


@pytest.fixture(scope="session")
def scene_long(scene_world, tmp_path_factory) -> Scene:
    """The exact world over 24 frames, so that all three gaps exist."""
    world = replace(scene_world, frames=24, camera=scene_world.camera / 2 + np.diag([0, 0, 0.5]), size=(180, 108))
    return open_scene(world.write_rgbd(tmp_path_factory.mktemp("long") / "long"))


@pytest.fixture(params=["exact", *RECORDED])
def scene_any(request, scene_long, scene_recorded):
    return scene_long if request.param == "exact" else scene_recorded(request.param)


def test_sound_scenes_are_called_sound(scene_any):
    report = check_scene(scene_any)
    assert report.sound and not report.findings
    assert [gap.gap for gap in report.gaps] == [1, 5, 20]
    assert report.gaps[0].share > 0.95 and report.gaps[1].share > 0.9


def test_recorded_scenes_agree_as_far_as_they_are_known_to(scene_real):
    """Figures of the data's own description."""
    known = {"hololens_dvmvs_a": (0.995, 0.970, 0.913), "apc_shelf_glue": (None, 0.952, 0.803)}[scene_real.root.name]
    for gap, share in zip(check_scene(scene_real).gaps, known, strict=True):
        assert share is None or abs(gap.share - share) < 0.03


@pytest.mark.parametrize(
    ("pose", "words"),
    [
        (rigid_inverse, "world-to-camera and camera-to-world are mistaken"),
        (lambda p: FLIP @ p, "camera axes are flipped"),
        (lambda p: rigid_inverse(FLIP @ p), "poses are inverted and camera axes are flipped"),
    ],
    ids=["inverted", "blender", "both"],
)
def test_a_mistaken_pose_convention_is_named(scene_any, pose, words):
    report = check_scene(mistaken(scene_any, pose))
    assert not report.sound
    assert len(report.findings) == 1 and words in report.findings[0]


@pytest.mark.parametrize(("scale", "cure"), [(1000.0, "0.001"), (0.001, "1000"), (0.2, "5")])
def test_a_mistaken_depth_scale_is_named_with_its_cure(scene_any, scale, cure):
    report = check_scene(mistaken(scene_any, scale=scale))
    assert len(report.findings) == 1
    assert f"multiplied by {cure}, depth agrees" in report.findings[0]


def test_two_mistakes_at_once_are_both_named(scene_any):
    findings = check_scene(mistaken(scene_any, rigid_inverse, 1000.0)).findings
    assert len(findings) == 2
    assert "inverted" in findings[0] and "multiplied by 0.001" in findings[1]


def test_poses_that_are_simply_wrong_are_not_explained_away(scene_long):
    draw = np.random.default_rng(0)

    def shaken(pose):
        angle = draw.normal(scale=0.15)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        turn[:3, 3] = draw.normal(scale=0.5, size=3)
        return turn @ pose

    findings = check_scene(mistaken(scene_long, shaken)).findings
    assert len(findings) == 1 and "no other reading" in findings[0]


def test_a_scene_without_known_depth_is_a_finding(scene_long):
    report = check_scene(mistaken(scene_long, scale=1e-60))
    assert report.findings == ["no frame looked at has a pixel of known depth"]


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_tells_what_is_there(scene_long, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(scene_long.root, "--json", tmp_path / "r.json") == 0
    said = capsys.readouterr().out
    for word in ("long", "rgbd", "24", "180×108", "sound"):
        assert word in said
    told = json.loads((tmp_path / "r.json").read_text())["scenes"][0]
    assert told["frames"] == 24 and [gap["gap"] for gap in told["gaps"]] == [1, 5, 20]
    assert told["gaps"][0]["baseline"] == pytest.approx(np.linalg.norm([0.08, 0.02, 0.05]), rel=1e-6)
    assert told["path_length"] == pytest.approx(23 * np.linalg.norm([0.08, 0.02, 0.05]), rel=1e-6)


def test_the_command_says_so_when_poses_are_inverted(scene_long, capsys, tmp_path):
    root = tmp_path / "s"
    root.mkdir()
    format_named("rgbd").write(mistaken(scene_long, rigid_inverse), root)
    assert run(root) == 1
    assert "camera-to-world are mistaken" in " ".join(capsys.readouterr().out.split())


def test_a_folder_of_scenes_is_walked_and_bad_ones_do_not_stop_it(scene_long, scene_boxes, capsys, tmp_path):
    for name, kind in (("1K/a", "vggt"), ("1K/b", "colmap"), ("c", "dl3dv")):
        (tmp_path / name).mkdir(parents=True)
        format_named(kind).write(scene_boxes, tmp_path / name)
    (tmp_path / "1K/a/intrinsics.npy").write_bytes(b"")
    assert run(tmp_path, "--jobs", 1) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "unreadable" in said and "intrinsics.npy" in said
    assert "colmap" in said and "dl3dv" in said and said.count("sound") == 2


def test_scenes_side_by_side_are_told_in_order(scene_long, scene_boxes, capsys, tmp_path):
    """The first one takes longest; the second is broken and costs only itself."""
    for name, scene in (("a", scene_long), ("b", scene_boxes), ("c", scene_boxes), ("d", scene_boxes)):
        (tmp_path / name).mkdir()
        format_named("vggt").write(scene, tmp_path / name)
    (tmp_path / "b/intrinsics.npy").write_bytes(b"")
    assert run(tmp_path, "--jobs", 2, "--json", tmp_path / "r.json", "--picture", tmp_path / "pictures") == 1
    told = json.loads((tmp_path / "r.json").read_text())
    assert [report["root"] for report in told["scenes"]] == [str(tmp_path / name) for name in "acd"]
    assert list(told["unreadable"]) == [str(tmp_path / "b")]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{n}-tracks.png" for n in "acd"]
    alone = asdict(check_scene(open_scene(tmp_path / "c")))
    assert told["scenes"][1] == json.loads(json.dumps(alone))
    with pytest.raises(ValueError, match="--jobs 0"):
        run(tmp_path, "--jobs", 0)


def test_no_scene_anywhere_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no scene here"):
        run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(tmp_path / "nowhere")


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_tracks(scene_boxes, tmp_path):
    picture = np.asarray(Image.open(draw_tracks(scene_boxes, tmp_path / "p.png")).convert("RGB"))
    assert picture.shape[1] > 1500 and picture.std() > 30
    colourful = np.ptp(picture.astype(int), axis=2) > 120
    assert colourful.mean() > 0.02


def test_the_picture_of_a_scene_that_never_matches_says_so(scene_boxes, tmp_path):
    away = mistaken(scene_boxes, pose=lambda p: np.diag([-1.0, 1.0, -1.0, 1.0]) @ p if p[0, 3] else p)
    assert draw_tracks(away, tmp_path / "p.png").stat().st_size > 10_000


def test_the_picture_flag_writes_beside_or_where_told(scene_boxes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(scene_boxes.root, "--picture", "--first", 2, "--grid", 6) == 0
    assert (tmp_path / "boxes-tracks.png").is_file()
    with pytest.raises(ValueError, match=r"name a \.png file"):
        run(scene_boxes.root, "--picture", tmp_path / "named.jpg")
    with pytest.raises(ValueError, match="first = 99"):
        run(scene_boxes.root, "--picture", "--first", 99)
