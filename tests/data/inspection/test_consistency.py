"""Sound scenes pass, and a wrong convention is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from support.commands import run
from support.scene_formats import mistaken, write_scene_as

from gasp_fast.cli import scenes as command
from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, rigid_inverse

RECORDED = ("hololens_dvmvs_a", "apc_shelf_glue")
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(scope="session")
def scene_long(scene_world, tmp_path_factory) -> Scene:
    """The exact world over 24 frames, so that all three gaps exist."""
    world = replace(scene_world, frames=24, camera=scene_world.camera / 2 + np.diag([0, 0, 0.5]), size=(180, 108))
    return open_scene(world.write_rgbd(tmp_path_factory.mktemp("long") / "long"))


@pytest.fixture(params=["exact", *RECORDED])
def scene_any(request, scene_long, scene_recorded):
    return scene_long if request.param == "exact" else scene_recorded(request.param)


def test_sound_scenes_have_no_findings(scene_any):
    report = check_scene(scene_any)
    assert report.sound and not report.findings
    assert [gap.gap for gap in report.gaps] == [1, 5, 20]
    assert report.gaps[0].share > 0.95 and report.gaps[1].share > 0.9


def test_recorded_scenes_have_the_published_agreement(scene_real):
    """Figures from the description of the recordings."""
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
def test_a_wrong_pose_convention_is_named(scene_any, pose, words):
    report = check_scene(mistaken(scene_any, pose))
    assert not report.sound
    assert len(report.findings) == 1 and words in report.findings[0]


@pytest.mark.parametrize(("scale", "cure"), [(1000.0, "0.001"), (0.001, "1000"), (0.2, "5")])
def test_a_wrong_depth_scale_is_named_with_its_correction(scene_any, scale, cure):
    report = check_scene(mistaken(scene_any, scale=scale))
    assert len(report.findings) == 1
    assert f"multiplied by {cure}, depth agrees" in report.findings[0]


def test_two_mistakes_at_once_are_both_named(scene_any):
    findings = check_scene(mistaken(scene_any, rigid_inverse, 1000.0)).findings
    assert len(findings) == 2
    assert "inverted" in findings[0] and "multiplied by 0.001" in findings[1]


def test_inaccurate_poses_are_not_explained_by_a_convention(scene_long):
    draw = np.random.default_rng(0)

    def shaken(pose):
        angle = draw.normal(scale=0.15)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        turn[:3, 3] = draw.normal(scale=0.5, size=3)
        return turn @ pose

    findings = check_scene(mistaken(scene_long, shaken)).findings
    assert len(findings) == 1 and "no other convention" in findings[0]


def test_a_scene_without_known_depth_is_a_finding(scene_long):
    report = check_scene(mistaken(scene_long, scale=1e-60))
    assert report.findings == ["none of the compared frames has a pixel of known depth"]


def test_the_command_prints_and_writes_its_findings(scene_long, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(command, scene_long.root, "--json", tmp_path / "r.json") == 0
    output = capsys.readouterr().out
    for word in ("long", "rgbd", "24", "180x108", "sound"):
        assert word in output
    written = json.loads((tmp_path / "r.json").read_text())["scenes"][0]
    assert written["frames"] == 24 and [gap["gap"] for gap in written["gaps"]] == [1, 5, 20]
    assert written["gaps"][0]["baseline"] == pytest.approx(np.linalg.norm([0.08, 0.02, 0.05]), rel=1e-6)
    assert written["path_length"] == pytest.approx(23 * np.linalg.norm([0.08, 0.02, 0.05]), rel=1e-6)


def test_the_command_names_inverted_poses(scene_long, capsys, tmp_path):
    root = tmp_path / "s"
    root.mkdir()
    write_scene_as("rgbd", mistaken(scene_long, rigid_inverse), root)
    assert run(command, root) == 1
    assert "camera-to-world are mistaken" in " ".join(capsys.readouterr().out.split())


def test_all_scenes_of_a_folder_are_checked_and_damaged_ones_do_not_stop_it(scene_long, scene_boxes, capsys, tmp_path):
    for name, kind in (("1K/a", "vggt"), ("1K/b", "colmap"), ("c", "dl3dv")):
        (tmp_path / name).mkdir(parents=True)
        write_scene_as(kind, scene_boxes, tmp_path / name)
    (tmp_path / "1K/a/intrinsics.npy").write_bytes(b"")
    assert run(command, tmp_path, "--jobs", 1) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "unreadable" in output and "intrinsics.npy" in output
    assert "colmap" in output and "dl3dv" in output and output.count("sound") == 2


def test_scenes_checked_in_parallel_are_reported_in_order(scene_long, scene_boxes, capsys, tmp_path):
    """The first one takes longest; the second is damaged and fails alone."""
    for name, scene in (("a", scene_long), ("b", scene_boxes), ("c", scene_boxes), ("d", scene_boxes)):
        (tmp_path / name).mkdir()
        write_scene_as("vggt", scene, tmp_path / name)
    (tmp_path / "b/intrinsics.npy").write_bytes(b"")
    assert run(command, tmp_path, "--jobs", 2, "--json", tmp_path / "r.json", "--picture", tmp_path / "pictures") == 1
    written = json.loads((tmp_path / "r.json").read_text())
    assert [report["root"] for report in written["scenes"]] == [str(tmp_path / name) for name in "acd"]
    assert list(written["unreadable"]) == [str(tmp_path / "b")]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{n}-tracks.png" for n in "acd"]
    alone = asdict(check_scene(open_scene(tmp_path / "c")))
    assert written["scenes"][1] == json.loads(json.dumps(alone))
    with pytest.raises(ValueError, match="--jobs 0"):
        run(command, tmp_path, "--jobs", 0)


def test_no_scene_anywhere_gives_a_one_line_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no scene here"):
        run(command, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(command, tmp_path / "nowhere")


def on_an_ascii_terminal(*words: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; from gasp_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_sound_scene_is_sound_on_a_terminal_without_unicode(scene_boxes_folder, tmp_path):
    root = shutil.copytree(scene_boxes_folder, tmp_path / "küche")
    done = on_an_ascii_terminal("scenes", root)
    assert done.returncode == 0 and "sound" in done.stdout and "360x216" in done.stdout and not done.stderr
    assert "k\\xfcche" in done.stdout


def test_names_that_look_like_markup_or_formulas_are_names(scene_boxes_folder, tmp_path, capsys):
    for name in ("[/b]", "[red] $x_{$"):  # the first is a folder `b]` in a folder `[`
        shutil.copytree(scene_boxes_folder, tmp_path / "s" / name)
    assert run(command, tmp_path / "s", "--jobs", 1, "--picture", tmp_path / "[" / "p]") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "[/b] rgbd" in output and "[red] $x_{$ rgbd" in output and output.count(" sound") == 2
    assert f"{tmp_path}/[/p]/b]-tracks.png" in output


@pytest.mark.parametrize("grid", [0, 1_000_000])
def test_an_absurd_grid_is_an_error_of_the_option_and_not_of_the_scenes(scene_boxes, grid):
    with pytest.raises(ValueError, match=f"--grid {grid}: 1 to 1024 query points"):
        run(command, scene_boxes.root, "--picture", "--grid", grid)
