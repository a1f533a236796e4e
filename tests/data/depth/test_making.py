"""Promises about depth for scenes without: robust alignment, honest errors, bad frames marked, nothing half written."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.cli import depth as command
from gasp_fast.data.depth.alignment import GOOD_ERROR, align
from gasp_fast.data.depth.making import depth_from_predictor, depth_from_stereo, has_stereo, sparse_points
from gasp_fast.data.scenes.computed_depth import FOLDER, read_index
from gasp_fast.data.scenes.depth_maps import write_depth
from gasp_fast.data.scenes.formats import format_named
from gasp_fast.data.scenes.formats.colmap_model import ModelImage, write_model
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene, without_depth
from gasp_fast.data.tracks.build import build_tracks

pytest.importorskip("pycolmap")
NO_LENS = (0.0, 0.0, 0.0, 0.0)


def world_points(world, f: int, count: int = 200) -> np.ndarray:
    """Surface points that frame `f` sees."""
    pixel = np.random.default_rng(f).uniform(2, np.array(world.size) - 2, (count, 2))
    rays = world.rays(f, pixel)
    return world.centre(f) + rays * world.distance(world.centre(f), rays)[:, None]


@pytest.fixture
def depthless(scene_world, scene_boxes, tmp_path) -> Scene:
    """As DL3DV comes: JSON, photographs, and a COLMAP model whose world is turned, moved and 2.5 times smaller."""
    root = tmp_path / "hash"
    root.mkdir()
    format_named("dl3dv").write(without_depth(scene_boxes), root)
    turn = np.eye(4)
    turn[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    turn[:3, 3] = [3, -2, 1]
    images = []
    for f in range(scene_world.frames):
        pose = scene_world.pose(f) @ turn
        pose[:3, 3] /= 2.5
        points = (world_points(scene_world, f) - turn[:3, 3]) @ turn[:3, :3] / 2.5
        images.append(ModelImage(f"images/{f:04d}.png", scene_world.size, scene_world.camera, NO_LENS, pose, points))
    write_model(root / "colmap" / "sparse" / "0", images)
    return open_scene(root)


def exact_predictor(world, space: str, spoil: dict[int, object] | None = None):
    """A perfect monocular model: it knows each frame by its pixels, and depth up to scale and shift."""
    known = {world.image(f).tobytes(): f for f in range(world.frames)}

    def predict(image: np.ndarray) -> np.ndarray:
        f = known[image.tobytes()]
        depth = world.depth(f)
        predicted = 0.4 * depth + 0.7 + 0.1 * f if space == "depth" else 3.0 / depth + 0.2 * f
        change = (spoil or {}).get(f)
        return change(predicted) if callable(change) else predicted.astype(np.float32)

    return predict


# ---- alignment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["depth", "inverse depth"])
@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_alignment_stands_up_to_wrong_points(space, wrong):
    draw = np.random.default_rng(1)
    z = np.exp(draw.uniform(0, 3, 300))
    y = z if space == "depth" else 1 / z
    x = (y - 0.05) / 1.7
    seen = z.copy()
    bad = draw.random(300) < wrong
    seen[bad] *= np.exp(draw.normal(scale=2, size=bad.sum()))
    fit = align(x, seen, space)
    assert fit.scale == pytest.approx(1.7, rel=1e-3) and fit.shift == pytest.approx(0.05, abs=1e-3)
    assert fit.fault is None
    np.testing.assert_allclose(fit.apply(x[None]), z[None], rtol=2e-2)


def test_noise_shows_as_error():
    draw = np.random.default_rng(1)
    z = draw.uniform(1, 5, 2000)
    fit = align(z, z * np.exp(draw.normal(scale=0.05, size=2000)), "depth")
    assert fit.error == pytest.approx(0.05 * 0.6745, rel=0.1)  # the median of |normal|


@pytest.mark.parametrize(
    ("x", "z", "words"),
    [
        (np.ones(10), np.ones(10), "sparse points; 30 are needed"),
        (np.linspace(1, 2, 100), np.linspace(5, 1, 100), "run against each other"),
        (np.linspace(1, 9, 200), np.linspace(1, 9, 200) * np.exp(np.sin(np.arange(200) * 7.0)), "points within 10%"),
        (np.arange(200) % 7.0, 3 + 0.3 * np.sin(np.arange(200) * 7.0) + 0.001 * (np.arange(200) % 7), "hardly below"),
        (np.ones(100), np.linspace(1, 2, 100), "run against each other"),
        (np.full(100, np.nan), np.linspace(1, 2, 100), "0 sparse points"),
    ],
)
def test_what_cannot_be_aligned_has_a_fault(x, z, words):
    assert words in align(x, z, "depth").fault


def test_depth_beyond_what_the_points_vouch_for_is_unknown():
    z = np.linspace(2, 6, 100)
    fit = align(1 / z, z, "inverse depth")
    assert fit.apply(np.array([[1 / 4.0, 0.0, -1.0, 1 / 500.0, 1 / 0.1]])).tolist() == [
        [pytest.approx(4.0), 0, 0, 0, 0]
    ]


# ---- from a model ---------------------------------------------------------------------------------------------------


def test_sparse_points_land_where_the_world_has_them(scene_world, depthless):
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


def test_bad_frames_are_marked_unusable_and_the_rest_stands(scene_world, depthless):
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


def test_predictions_of_another_resolution_are_fine(scene_world, depthless):
    exact = exact_predictor(scene_world, "inverse depth")
    depth_from_predictor(depthless, lambda image: exact(image)[::2, ::3])
    scene = open_scene(depthless.root)
    assert scene.depth(0).shape == (108, 120)
    tracks = build_tracks(scene, range(8), keep=1.0)
    assert len(tracks) > 40


def test_without_sparse_points_there_is_no_scale_and_it_says_so(scene_world, depthless):
    shutil.rmtree(depthless.root / "colmap")
    with pytest.raises(ValueError, match="no frame has 30 COLMAP points"):
        depth_from_predictor(open_scene(depthless.root), exact_predictor(scene_world, "depth"))


def test_a_run_that_dies_leaves_no_index(scene_world, depthless):
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


# ---- from stereo ----------------------------------------------------------------------------------------------------


def write_workspace(world, root: Path) -> None:
    """A dense workspace as image_undistorter leaves it: a crop, so other intrinsics than the scene's."""
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
        images.append(ModelImage(f"{f:04d}.png", depth.shape[::-1], camera, NO_LENS, world.pose(f), points))
    write_model(root / "colmap" / "dense" / "sparse", images)


def test_stereo_maps_are_carried_over(scene_world, scene_boxes, tmp_path):
    root = tmp_path / "hash"
    root.mkdir()
    format_named("dl3dv").write(without_depth(scene_boxes), root)
    write_workspace(scene_world, root)
    scene = open_scene(root)
    assert scene.format == "dl3dv" and has_stereo(scene) and not scene.has_depth
    index = depth_from_stereo(scene)
    assert index.frames["0004"].reason == "no stereo map" and index.frames["0005"].reason == "the stereo map is empty"
    assert len(index.usable) == 6 and index.frames["0000"].error < 2e-3
    scene = open_scene(root)
    inner = np.s_[6:-6, 10:-10]
    np.testing.assert_allclose(scene.depth(0)[inner], scene_world.depth(0)[inner], rtol=1e-3)
    assert not scene.depth(0)[:6].any() and not scene.depth(0)[:, -10:].any()


# ---- the command, with a real model class ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_depth_model(tmp_path_factory) -> Path:
    """DPT with random weights, saved as transformers saves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from gasp_fast.backbones.torchvision_shim import install

    install()
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    folder = tmp_path_factory.mktemp("dpt")
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_runs_a_real_model_and_does_not_believe_it(scene_world, depthless, tiny_depth_model, capsys):
    """Random weights know nothing of depth: the fit must say so, frame by frame, instead of passing them on. Only
    before a flat wall, which any prediction fits, does it depend on the last digits whether they are believed."""
    depths = [scene_world.depth(f) for f in range(scene_world.frames)]
    flat = {f"{f:04d}" for f, z in enumerate(depths) if np.median(np.abs(z / np.median(z) - 1)) < GOOD_ERROR}
    assert len(flat) <= 1
    code = run(depthless.root, "--model", tiny_depth_model)
    index = read_index(depthless.root / FOLDER / "index.json")
    assert index.model == str(tiny_depth_model) and set(index.usable) <= flat
    assert code == (0 if index.usable else 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(index.usable)} of 8 frames usable" in said
    assert all(f"unusable {f:04d}" in said for f in range(8) if f"{f:04d}" not in flat)


def test_the_model_is_a_function_from_image_to_map(tiny_depth_model, scene_boxes):
    from gasp_fast.data.depth.monocular import DepthModel

    model = DepthModel(tiny_depth_model)
    first = model(scene_boxes.image(0))
    assert first.shape == (216, 360) and np.isfinite(first).all() and first.std() > 0
    assert np.array_equal(first, model(scene_boxes.image(0)))


def test_the_command_prefers_stereo_and_works_once(scene_world, scene_boxes, tmp_path, capsys):
    root = tmp_path / "hash"
    root.mkdir()
    format_named("dl3dv").write(without_depth(scene_boxes), root)
    write_workspace(scene_world, root)
    assert run(root) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 of 8 frames usable, from mvs" in said and "frames agree with each other: gap 1: 0.9" in said
    assert run(root) == 0
    assert "has computed depth already" in " ".join(capsys.readouterr().out.split())


def test_scenes_with_depth_of_their_own_are_left_alone(scene_boxes, capsys):
    assert run(scene_boxes.root, "--force") == 0
    assert "comes with depth" in capsys.readouterr().out
    assert not (scene_boxes.root / FOLDER).exists()


def test_missing_models_are_one_line(depthless, tmp_path):
    with pytest.raises(ValueError, match="give --model DIR"):
        run(depthless.root)
    with pytest.raises(ValueError, match=r"no config\.json"):
        run(depthless.root, "--model", tmp_path)
