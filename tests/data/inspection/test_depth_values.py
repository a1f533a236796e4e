"""Values that mean "unknown" are no depth: declared ones are counted, others are noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import run
from support.scene_formats import write_scene_as

from gasp_fast.cli import scenes as command
from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import build_tracks


def with_holes(scene: Scene, root: Path, value: float, suffix: str = ".png") -> Path:
    """The scene as `rgbd`, with `value`, as it is stored, in a fifth of each depth map."""
    write_scene_as("rgbd", scene, root)
    for path in sorted((root / "depth").iterdir()):
        stored = np.asarray(Image.open(path)).astype(np.float32 if suffix == ".npy" else np.uint16)
        stored[: len(stored) // 5] = value
        if suffix == ".npy":
            np.save(path.with_suffix(".npy"), stored / 1000)
            path.unlink()
        else:
            Image.fromarray(stored).save(path)
    return root


def test_the_largest_value_of_sixteen_bits_is_no_depth_and_is_counted(
    scene_room: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = with_holes(scene_room, tmp_path / "s", 65535)
    scene = open_scene(root)
    assert (scene.depth(0)[:44] == 0).all() and (scene.depth(0)[45:] > 0).mean() > 0.9
    assert scene.depth(0).max() < 20
    report = check_scene(scene)
    assert report.sound and abs(report.marked_unknown - 0.2) < 0.01 and report.known_depth < 0.81
    assert run(command, root) == 0
    assert "20% of the depth values stand for unknown (beside 0)" in " ".join(capsys.readouterr().out.split())
    query = build_tracks(scene, [0, 1, 2], keep=1.0).query
    assert len(query) and query[:, 1].min() >= 44


@pytest.mark.parametrize(("suffix", "value", "declared"), [(".png", 60000, 60000), (".npy", 65535, [65.535, 3e38])])
def test_another_value_is_a_finding_until_it_is_declared(
    scene_room: Scene, tmp_path: Path, suffix: str, value: float, declared: object
) -> None:
    root = with_holes(scene_room, tmp_path, value, suffix)
    findings = [finding for finding in check_scene(open_scene(root)).findings if "probably means unknown" in finding]
    assert len(findings) == 1 and findings[0].startswith("20% of the pixels have the depth 6")
    assert '"depth_invalid": VALUE' in findings[0]
    meta = json.loads((root / "meta.json").read_text())
    (root / "meta.json").write_text(json.dumps({**meta, "depth_invalid": declared}))
    report = check_scene(open_scene(root))
    assert report.sound and abs(report.marked_unknown - 0.2) < 0.01


def test_zero_is_unknown_without_being_counted(scene_room: Scene, tmp_path: Path) -> None:
    root = with_holes(scene_room, tmp_path, 0)
    meta = json.loads((root / "meta.json").read_text())
    (root / "meta.json").write_text(json.dumps({**meta, "depth_invalid": [0]}))
    report = check_scene(open_scene(root))
    assert report.sound and report.marked_unknown == 0 and report.known_depth < 0.81


def test_vggt_and_dl3dv_scenes_declare_values_too(scene_boxes: Scene, tmp_path: Path) -> None:
    value = float(scene_boxes.depth(0)[10, 10])
    for name, file in (("vggt", "meta.json"), ("dl3dv", "transforms.json")):
        root = tmp_path / name
        root.mkdir()
        write_scene_as(name, scene_boxes, root)
        assert open_scene(root).depth(0)[10, 10] > 0
        meta = json.loads((root / file).read_text()) if (root / file).exists() else {}
        (root / file).write_text(json.dumps({**meta, "depth_invalid": value}))
        assert open_scene(root).depth(0)[10, 10] == 0


def test_a_declaration_that_is_no_number_is_refused(scene_boxes_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(scene_boxes_folder, tmp_path / "s")
    (root / "meta.json").write_text(json.dumps({"depth_invalid": ["65535"]}))
    with pytest.raises(ValueError, match=r"meta\.json: depth_invalid = \['65535'\] is neither a number nor a list"):
        open_scene(root)
