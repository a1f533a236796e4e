"""Computed depth has the scene's scale and a true error; bad frames are unusable; a killed run leaves no index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import run
from support.scene_formats import write_depth, write_dl3dv, write_model

from gasp_fast.cli import depth as command
from gasp_fast.data.depth.alignment import GOOD_ERROR
from gasp_fast.data.depth.compute import depth_from_mvs, depth_from_predictor, has_mvs, sparse_points
from gasp_fast.data.scenes.computed_depth import FOLDER, read_index
from gasp_fast.data.scenes.formats.colmap_model import ModelImage
from gasp_fast.data.scenes.lens import NO_DISTORTION
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, without_depth
from gasp_fast.data.tracks.build import build_tracks

pytest.importorskip("pycolmap")


def world_points(world, f: int, count: int = 200) -> np.ndarray:
    """Surface points that frame `f` sees."""
    pixel = np.random.default_rng(f).uniform(2, np.array(world.size) - 2, (count, 2))
    rays = world.rays(f, pixel)
    return world.centre(f) + rays * world.distance(world.centre(f), rays)[:, None]


@pytest.fixture
def depthless(scene_world, scene_boxes, tmp_path) -> Scene:
    """A scene as downloaded from DL3DV, with a COLMAP model in other world axes and 2.5 times smaller."""
    root = tmp_path / "hash"
    root.mkdir()
    write_dl3dv(without_depth(scene_boxes), root)
    turn = np.eye(4)
    turn[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    turn[:3, 3] = [3, -2, 1]
    images = []
    for f in range(scene_world.frames):
        pose = scene_world.pose(f) @ turn
        pose[:3, 3] /= 2.5
        points = (world_points(scene_world, f) - turn[:3, 3]) @ turn[:3, :3] / 2.5
        images.append(
            ModelImage(f"images/{f:04d}.png", scene_world.size, scene_world.camera, NO_DISTORTION, pose, points)
        )
    write_model(root / "colmap" / "sparse" / "0", images)
    return open_scene(root)


def exact_predictor(world, space: str, spoil: dict[int, object] | None = None):
    """A perfect monocular model: it recognises each frame, and predicts its depth up to scale and shift."""
    known = {world.image(f).tobytes(): f for f in range(world.frames)}

    def predict(image: np.ndarray) -> np.ndarray:
        f = known[image.tobytes()]
        depth = world.depth(f)
        predicted = 0.4 * depth + 0.7 + 0.1 * f if space == "depth" else 3.0 / depth + 0.2 * f
        change = (spoil or {}).get(f)
        return change(predicted) if callable(change) else predicted.astype(np.float32)

    return predict


def test_sparse_points_have_the_depth_of_the_world(scene_world, depthless):
    points = sparse_points(depthless)
    assert sorted(points) == depthless.frame_names
    known = points["0003"]
    assert len(known.depth) > 150
    row, column = known.pixel[:, 1].astype(int), known.pixel[:, 0].astype(int)
    there = scene_world.depth(3)[row, column]
    assert np.median(np.abs(there - known.depth) / known.depth) < 2e-3  # in the scene's unit, not the model's


@pytest.mark.parametrize("space", ["depth", "inverse depth"])
def test_an_exact_model_gives_exact_depth_whatever_space_it_predicts_in(scene_world, depthless, space):
    index = depth_from_predictor(depthless, exact_predictor(scene_world, space), "exact")
    assert index.space == space and len(index.usable) == scene_world.frames
    assert all(fit.error < 2e-3 for fit in index.frames.values())
    scene = open_scene(depthless.root)
    assert scene.has_depth
    for f in range(len(scene)):
        np.testing.assert_allclose(scene.depth(f), scene_world.depth(f), rtol=5e-3)
    assert len(build_tracks(scene, range(8))) > 16


def test_bad_frames_are_unusable_and_the_others_are_used(scene_world, depthless):
    draw = np.random.default_rng(0)
    spoil = {
        2: lambda p: draw.uniform(1, 2, p.shape).astype(np.float32),
        5: lambda p: np.full(p.shape, np.nan, np.float32),
        6: lambda p: -p,
    }
    index = depth_from_predictor(depthless, exact_predictor(scene_world, "inverse depth", spoil))
    assert sorted(set(index.frames) - set(index.usable)) == ["0002", "0005", "0006"]
    assert all(index.frames[name].reason for name in ("0002", "0005", "0006"))
    scene = open_scene(depthless.root)
    assert not scene.depth(2).any() and scene.depth(3).any()


def test_predictions_may_have_another_resolution(scene_world, depthless):
    exact = exact_predictor(scene_world, "inverse depth")
    depth_from_predictor(depthless, lambda image: exact(image)[::2, ::3])
    scene = open_scene(depthless.root)
    assert scene.depth(0).shape == (108, 120)
    tracks = build_tracks(scene, range(8), keep=1.0)
    assert len(tracks) > 40


def test_without_sparse_points_the_missing_scale_is_an_error(scene_world, depthless):
    shutil.rmtree(depthless.root / "colmap")
    with pytest.raises(ValueError, match="no frame has 30 COLMAP points"):
        depth_from_predictor(open_scene(depthless.root), exact_predictor(scene_world, "depth"))


def test_a_killed_run_leaves_no_index(scene_world, depthless):
    exact = exact_predictor(scene_world, "depth")
    calls = []

    def dies(image):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return exact(image)

    with pytest.raises(KeyboardInterrupt):
        depth_from_predictor(depthless, dies)
    assert not open_scene(depthless.root).has_depth
    depth_from_predictor(depthless, exact)
    assert open_scene(depthless.root).has_depth
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        depth_from_predictor(depthless, dies)
    assert not open_scene(depthless.root).has_depth  # nor the index of the run before, beside half of the new maps


def test_a_damaged_index_is_named(scene_world, depthless):
    depth_from_predictor(depthless, exact_predictor(scene_world, "depth"))
    path = depthless.root / FOLDER / "index.json"
    for text in ("{", "[]", json.dumps({**json.loads(path.read_text()), "version": 99})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json.*run gasp-fast depth again"):
            open_scene(depthless.root)


def write_workspace(world, root: Path) -> None:
    """A dense workspace as image_undistorter writes it: cropped, so its intrinsics differ from the scene's."""
    camera = world.camera.copy()
    camera[:2, 2] -= (10, 6)
    maps = root / "colmap" / "dense" / "stereo" / "depth_maps"
    maps.mkdir(parents=True)
    images = []
    for f in range(world.frames):
        depth = world.depth(f)[6:-6, 10:-10].astype(np.float32)
        if f != 4:
            write_depth(maps / f"{f:04d}.png.geometric.bin", np.zeros_like(depth) if f == 5 else depth)
        points = world_points(world, f)
        images.append(ModelImage(f"{f:04d}.png", depth.shape[::-1], camera, NO_DISTORTION, world.pose(f), points))
    write_model(root / "colmap" / "dense" / "sparse", images)


def test_stereo_maps_are_resampled_to_the_frames(scene_world, scene_boxes, tmp_path):
    root = tmp_path / "hash"
    root.mkdir()
    write_dl3dv(without_depth(scene_boxes), root)
    write_workspace(scene_world, root)
    scene = open_scene(root)
    assert scene.format == "dl3dv" and has_mvs(scene) and not scene.has_depth
    index = depth_from_mvs(scene)
    assert index.frames["0004"].reason == "no stereo map" and index.frames["0005"].reason == "the stereo map is empty"
    assert len(index.usable) == 6 and index.frames["0000"].error < 2e-3
    scene = open_scene(root)
    inner = np.s_[6:-6, 10:-10]
    np.testing.assert_allclose(scene.depth(0)[inner], scene_world.depth(0)[inner], rtol=1e-3)
    assert not scene.depth(0)[:6].any() and not scene.depth(0)[:, -10:].any()


def test_the_command_runs_a_real_model_and_rejects_random_weights(scene_world, depthless, tiny_depth_model, capsys):
    """Random weights predict no depth: the fit must reject them, frame by frame. Only a frame of a flat wall may be
    accepted, because any prediction fits it."""
    depths = [scene_world.depth(f) for f in range(scene_world.frames)]
    flat = {f"{f:04d}" for f, z in enumerate(depths) if np.median(np.abs(z / np.median(z) - 1)) < GOOD_ERROR}
    assert len(flat) <= 1
    code = run(command, depthless.root, "--model", tiny_depth_model)
    index = read_index(depthless.root / FOLDER / "index.json")
    assert index.model == str(tiny_depth_model) and set(index.usable) <= flat
    assert code == (0 if index.usable else 1)
    output = " ".join(capsys.readouterr().out.split())
    assert f"{len(index.usable)} of 8 frames usable" in output
    assert all(f"unusable {f:04d}" in output for f in range(8) if f"{f:04d}" not in flat)


def test_the_command_prefers_stereo_and_computes_it_once(scene_world, scene_boxes, tmp_path, capsys):
    root = tmp_path / "hash"
    root.mkdir()
    write_dl3dv(without_depth(scene_boxes), root)
    write_workspace(scene_world, root)
    assert run(command, root) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "6 of 8 frames usable, from mvs" in output and "frames agree with each other: gap 1: 0.9" in output
    assert run(command, root) == 0
    assert "has computed depth already" in " ".join(capsys.readouterr().out.split())


def test_scenes_with_depth_of_their_own_stay_unchanged(scene_boxes, capsys):
    assert run(command, scene_boxes.root, "--force") == 0
    assert "comes with depth" in capsys.readouterr().out
    assert not (scene_boxes.root / FOLDER).exists()


def test_missing_models_give_a_one_line_error(depthless, tmp_path):
    with pytest.raises(ValueError, match="give --model DIR"):
        run(command, depthless.root)
    with pytest.raises(ValueError, match=r"no config\.json"):
        run(command, depthless.root, "--model", tmp_path)


def test_one_broken_scene_does_not_end_the_command(scene_world, scene_boxes, tmp_path, capsys):
    for name in "abc":
        root = tmp_path / name
        root.mkdir()
        write_dl3dv(without_depth(scene_boxes), root)
        write_workspace(scene_world, root)
    (tmp_path / "a" / "transforms.json").write_text("[" * 100_000)
    for file in (tmp_path / "b" / "colmap" / "dense" / "sparse").iterdir():
        file.write_bytes(b"\1" * 20)
    assert run(command, tmp_path) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert f"failed: {tmp_path}/a/transforms.json: not JSON" in output
    assert f"failed: {tmp_path}/b/colmap/dense/sparse" in output
    assert f"{tmp_path}/c: 6 of 8 frames usable" in output


def test_a_damaged_stereo_map_costs_its_frame_only(scene_world, scene_boxes, tmp_path):
    write_dl3dv(without_depth(scene_boxes), tmp_path)
    write_workspace(scene_world, tmp_path)
    map_file = next(tmp_path.rglob("0002.png.geometric.bin"))
    map_file.write_bytes(map_file.read_bytes()[:-100])
    index = depth_from_mvs(open_scene(tmp_path))
    assert len(index.usable) == 5
    assert index.frames["0002"].reason.startswith("colmap/dense/stereo/depth_maps/0002.png.geometric.bin: cannot read")


def test_a_device_that_is_not_here_and_a_damaged_model_are_one_line(depthless, tiny_depth_model, tmp_path):
    for device in ("bogus", "meta"):
        with pytest.raises(ValueError, match=f"device = '{device}' cannot be used here") as caught:
            run(command, depthless.root, "--model", tiny_depth_model, "--device", device)
        assert "\n" not in str(caught.value)
    broken = shutil.copytree(tiny_depth_model, tmp_path / "broken")
    (broken / "config.json").write_text("[" * 100_000)
    with pytest.raises(OSError, match="broken: cannot load the depth model") as caught:
        run(command, depthless.root, "--model", broken)
    assert "\n" not in str(caught.value)
