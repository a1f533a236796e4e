"""Photographs show wrong poses and unregistered depth that depth maps alone do not; sound scenes raise no alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.scene_formats import mistaken

from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.inspection.displacement import displacement, patch_distances
from gasp_fast.data.inspection.registration import depth_offset
from gasp_fast.data.inspection.views import View, reduced_view
from gasp_fast.data.scenes.scene import Scene


def turning(degrees: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Turns each pose about another random axis."""
    draw = np.random.default_rng(seed)

    def turned(pose: np.ndarray) -> np.ndarray:
        axis = draw.normal(size=3)
        x, y, z = axis / np.linalg.norm(axis) * np.radians(degrees)
        turn = np.eye(4)
        turn[:3, :3], _ = np.linalg.qr(np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]]))
        turn[:3, :3] *= np.sign(np.diag(turn[:3, :3]))
        return turn @ pose

    return turned


def with_depth_moved(scene: Scene, folder: Path, right: int, down: int) -> Scene:
    """The scene with its depth maps moved by whole pixels; 0 comes in at the sides."""
    frames = []
    for frame in scene.frames:
        assert frame.depth is not None
        stored = np.asarray(Image.open(frame.depth.path)).astype(np.uint16)
        height, width = stored.shape
        moved = np.zeros_like(stored)
        moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = stored[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
        Image.fromarray(moved).save(folder / f"{frame.name}.png")
        frames.append(replace(frame, depth=replace(frame.depth, path=folder / f"{frame.name}.png")))
    return replace(scene, frames=tuple(frames))


def test_rendered_scenes_raise_no_alarm(scene_rendered: Scene) -> None:
    report = check_scene(scene_rendered)
    assert not report.findings and not report.warnings
    assert [moved.gap for moved in report.displacements] == [1, 5]
    assert all(moved.degrees < 0.1 for moved in report.displacements)
    assert report.depth_offset is not None and report.depth_offset.share < 0.005


def test_recorded_scenes_raise_no_alarm(scene_real: Scene) -> None:
    """Their own errors are measured: handheld cameras, depth from another camera."""
    report = check_scene(scene_real)
    assert not report.findings and not report.warnings
    assert len(report.displacements) == 2 and report.displacements[0].degrees < 0.2
    assert report.depth_offset is not None and report.depth_offset.share < 0.01


def test_poses_turned_by_one_degree_are_found(scene_rendered: Scene) -> None:
    turned = mistaken(scene_rendered, turning(1.0, 0))
    moved = displacement(turned, gap=1)
    assert moved is not None and 0.6 < moved.degrees < 1.5
    (finding,) = check_scene(turned).findings
    by_photographs = finding.startswith("photographs show points ") and "1 frame later: poses, time" in finding
    assert by_photographs or "inaccurate poses" in finding


def test_poses_of_recorded_scenes_turned_by_one_degree_are_found(scene_real: Scene) -> None:
    turned = mistaken(scene_real, turning(1.0, 0))
    moved = displacement(turned, gap=1)
    assert moved is not None and moved.degrees > 0.4
    assert len(check_scene(turned).findings) == 1


@pytest.mark.parametrize(("right", "down"), [(8, 0), (0, -8)])
def test_depth_moved_by_eight_pixels_is_found(scene_rendered: Scene, tmp_path: Path, right: int, down: int) -> None:
    finding, *_ = check_scene(with_depth_moved(scene_rendered, tmp_path, right, down)).findings
    assert f"moved by {-right:+d} pixels to the right and {-down:+d} down" in finding and "register depth" in finding


def test_depth_of_recorded_scenes_moved_by_eight_pixels_is_found(scene_real: Scene, tmp_path: Path) -> None:
    """Downwards or to the left: one of them is off by 4 pixels already, and not farther off in the other directions."""
    findings = check_scene(with_depth_moved(scene_real, tmp_path, 0, 8)).findings
    assert any("depth lies beside the photographs" in finding for finding in findings)


def test_photographs_without_texture_or_outlines_say_nothing(scene_room: Scene, tmp_path: Path) -> None:
    Image.new("RGB", (224, 224), (120, 120, 120)).save(tmp_path / "grey.png")
    blank = replace(
        scene_room, frames=tuple(replace(frame, image=tmp_path / "grey.png") for frame in scene_room.frames)
    )
    report = check_scene(blank)
    assert report.sound and not report.displacements and report.depth_offset is None
    assert depth_offset(scene_room, [0]) is None  # one frame cannot be compared with others


def test_a_patch_is_found_as_far_away_as_the_photograph_was_moved() -> None:
    """A wall at depth 2 and a camera that does not move; the second photograph is moved by 3 and 4 pixels."""
    grey = np.random.default_rng(0).uniform(0, 255, (130, 170)).astype(np.float32)
    camera = np.array([[200.0, 0, 80], [0, 200.0, 60], [0, 0, 1]])
    views = [View(one, np.full(one.shape, 2.0), camera, np.eye(4), 1) for one in (grey[:120, :160], grey[4:124, 3:163])]
    distances = patch_distances(*views)
    assert len(distances) > 50 and (distances == 5).all()
    assert (patch_distances(views[0], views[0]) == 0).all()


def test_a_view_keeps_the_nearest_known_depth_of_each_of_its_pixels(scene_room: Scene) -> None:
    image = np.random.default_rng(0).integers(0, 255, (480, 642, 3)).astype(np.uint8)
    depth = np.zeros((480, 642), np.float32)
    depth[0, 1], depth[1, 1], depth[3, 640] = 4, 3, 5

    class Wide(Scene):
        def image(self, i: int) -> np.ndarray:
            return image

        def depth(self, i: int) -> np.ndarray:
            return depth

    view = reduced_view(Wide(scene_room.root, scene_room.format, scene_room.frames), 0)
    assert view.step == 2 and view.grey.shape == view.depth.shape == (240, 321)
    assert view.depth[0, 0] == 3 and view.depth[1, 320] == 5 and view.depth.sum() == 8
    np.testing.assert_allclose(view.grey[0, 0], image[:2, :2].mean(), rtol=1e-5)
