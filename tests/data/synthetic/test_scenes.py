"""The renderer's geometry is exact, its bytes are reproducible, and its scenes are as hard as intended."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.exact_scene import exact_tracks, rays, trace

from gasp_fast.data.synthetic.scenes import (
    COLOURS,
    SyntheticConfig,
    SyntheticScene,
    make_scene,
    render_scenes,
    write_scene,
)

SMALL = SyntheticConfig(frames=4, width=64, height=48)


@pytest.fixture(scope="module")
def scene() -> SyntheticScene:
    return make_scene(3)


def pixel_centres(scene: SyntheticScene) -> np.ndarray:
    x, y = np.arange(scene.config.width) + 0.5, np.arange(scene.config.height) + 0.5
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def folder_hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [str(path.relative_to(folder)).encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def grid(cells: int, scene: SyntheticScene) -> np.ndarray:
    x = (np.arange(cells) + 0.5) * scene.config.width / cells
    y = (np.arange(cells) + 0.5) * scene.config.height / cells
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("seed", range(4))
def test_rendered_depth_is_what_an_independent_ray_caster_finds(seed: int) -> None:
    scene = make_scene(seed)
    for index in (0, 17):
        frame = scene.render(index)
        depth, surface = trace(scene, *rays(scene, index, pixel_centres(scene)))
        np.testing.assert_allclose(frame.depth.ravel(), depth, rtol=1e-6)
        assert np.mean(frame.surface.ravel() != surface) < 1e-4  # a ray may graze the seam of two faces


def test_every_hit_point_lies_on_the_surface_it_names(scene: SyntheticScene) -> None:
    origins, directions = rays(scene, 5, pixel_centres(scene))
    distance, surface = trace(scene, origins, directions)
    points = origins + distance[:, None] * directions
    for number, box in enumerate(scene.boxes):
        own = surface // 6 == number + 1
        local = (points[own] - box.centre) @ box.rotation / box.half
        np.testing.assert_allclose(np.abs(local).max(axis=1), 1, atol=1e-9)
        face = surface[own] % 6
        np.testing.assert_allclose(local[np.arange(len(face)), face // 2], np.where(face % 2, 1, -1), atol=1e-9)
    room = surface < 6
    side, face = points[room], surface[room]
    np.testing.assert_allclose(side[np.arange(len(face)), face // 2], scene.room[face % 2, face // 2], atol=1e-9)


def test_poses_are_rigid_and_right_handed_and_keep_a_distance_from_everything() -> None:
    for seed in range(20):
        scene = make_scene(seed)
        rotation, eyes = scene.camera_to_world[:, :3, :3], scene.camera_to_world[:, :3, 3]
        identity = np.broadcast_to(np.eye(3), rotation.shape)
        np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), identity, atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-12)
        assert (eyes > scene.room[0] + 0.3).all() and (eyes < scene.room[1] - 0.3).all()
        assert (rotation[:, 2, 1] < 0).all()  # the image's down axis points down


def test_an_exact_track_lands_on_the_same_surface_with_the_same_depth(scene: SyntheticScene) -> None:
    frames = [4, 9, 20]
    query = grid(32, scene)
    tracks = exact_tracks(scene, frames, query)
    first = trace(scene, *rays(scene, frames[0], query))[1]
    np.testing.assert_allclose(tracks.uv[:, 0], query, atol=1e-9)
    assert tracks.visible[:, 0].all()
    for place in (1, 2):
        seen = tracks.visible[:, place]
        assert 0.05 < seen.mean() < 0.98
        depth, surface = trace(scene, *rays(scene, frames[place], tracks.uv[seen, place]))
        np.testing.assert_allclose(depth, tracks.depth[seen, place], rtol=1e-6)
        assert np.mean(surface == first[seen]) > 0.999


def test_a_hidden_point_has_a_nearer_surface_in_front(scene: SyntheticScene) -> None:
    """In-view points that are not visible must really have something in front of them."""
    frames, query = [0, 16], grid(64, scene)
    tracks = exact_tracks(scene, frames, query)
    uv = tracks.uv[:, 1]
    size = np.array([scene.config.width, scene.config.height])
    inside = (tracks.depth[:, 1] > 0) & np.all((uv >= 4) & (uv <= size - 4), axis=1)
    hidden = inside & ~tracks.visible[:, 1]
    assert hidden.sum() > 20
    depth, _ = trace(scene, *rays(scene, frames[1], uv[hidden]))
    assert (depth < tracks.depth[hidden, 1]).all()


def test_two_boxes_are_identical_and_at_different_depths() -> None:
    for seed in range(20):
        scene = make_scene(seed)
        near, far = scene.boxes[:2]
        assert (near.half, near.colour, near.texture) == (far.half, far.colour, far.texture)
        middle = scene.camera_to_world[len(scene) // 2]
        depths = [(np.array(box.centre) - middle[:3, 3]) @ middle[:3, 2] for box in (near, far)]
        assert depths[1] - depths[0] > 0.8


def test_boxes_never_intersect() -> None:
    for seed in range(20):
        boxes = make_scene(seed).boxes
        for number, box in enumerate(boxes):
            for other in boxes[:number]:
                gap = np.hypot(*np.subtract(box.centre, other.centre)[:2])
                assert gap > np.hypot(*box.half[:2]) + np.hypot(*other.half[:2])


def test_the_same_position_guess_fails_on_most_points() -> None:
    """PCK@2 of "nothing moved" on a 14 x 14 token grid, over 30 random sequences of 12 frames."""
    rates = []
    for seed in range(100, 130):
        scene = make_scene(seed)
        rng = np.random.default_rng(seed)
        anchor = int(rng.integers(len(scene)))
        others = rng.permutation([i for i in range(len(scene)) if i != anchor])[:11]
        tracks = exact_tracks(scene, [anchor, *others], grid(8, scene))
        seen = tracks.visible.copy()
        seen[:, 0] = False
        keep = np.argsort(-seen.sum(axis=1), kind="stable")[:32]
        cell = np.floor(tracks.uv[keep] / 16)
        shift = np.linalg.norm(cell - cell[:, :1], axis=-1)
        rates.append(np.mean(shift[seen[keep]] <= 2))
    assert np.mean(rates) <= 0.39


def test_brightness_and_colour_reveal_little(scene: SyntheticScene) -> None:
    assert np.ptp([np.dot(colour, (0.299, 0.587, 0.114)) for colour in COLOURS.values()]) < 0.06
    plain = replace(scene, config=replace(scene.config, exposure_jitter=0.0, white_balance_jitter=0.0))
    means = np.array([[s.render(i).image.mean(axis=(0, 1)) for i in range(0, 32, 4)] for s in (scene, plain)])
    gain = np.log(means[0] / means[1])  # [frames, 3]
    assert gain.mean(axis=1).std() > 0.05  # exposure differs from frame to frame
    assert (gain[:, 0] - gain[:, 2]).std() > 0.02  # and so does white balance
    np.testing.assert_allclose(scene.textures.mean(axis=(1, 2)), 0.5, atol=0.02)


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    one = list(render_scenes(tmp_path / "one", 3, seed=5, config=SMALL, workers=1))
    two = list(render_scenes(tmp_path / "two", 3, seed=5, config=SMALL, workers=3))
    assert [path.name for path in one] == ["scene-000005", "scene-000006", "scene-000007"]
    assert [folder_hash(path) for path in one] == [folder_hash(path) for path in two]
    assert len({folder_hash(path) for path in one}) == 3


def test_a_killed_run_leaves_no_incomplete_scene_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder_hash(next(render_scenes(tmp_path / "whole", 1, config=SMALL)))
    calls = 0
    save = Image.Image.save

    def save_until_killed(self: Image.Image, *args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        save(self, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", save_until_killed)
        list(render_scenes(tmp_path / "out", 1, config=SMALL, workers=1))
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
    folder = next(render_scenes(tmp_path / "out", 1, config=SMALL))
    assert folder_hash(folder) == whole
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]


def test_a_scene_of_another_version_is_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next(render_scenes(tmp_path, 1, config=SMALL))
    stamp = (folder / "meta.json").stat().st_mtime_ns
    monkeypatch.setattr("gasp_fast.data.synthetic.scenes.VERSION", 0)
    next(render_scenes(tmp_path, 1, config=SMALL))
    assert (folder / "meta.json").stat().st_mtime_ns != stamp


def test_a_finished_scene_is_kept_and_another_configuration_replaces_it(tmp_path: Path) -> None:
    folder = next(render_scenes(tmp_path, 1, config=SMALL))
    stamp = (folder / "meta.json").stat().st_mtime_ns
    next(render_scenes(tmp_path, 1, config=SMALL))
    assert (folder / "meta.json").stat().st_mtime_ns == stamp
    next(render_scenes(tmp_path, 1, config=replace(SMALL, frames=2)))
    assert len(list((folder / "color").iterdir())) == 2


def test_a_written_folder_follows_the_rgbd_format(tmp_path: Path) -> None:
    scene = make_scene(7, SMALL)
    write_scene(scene, tmp_path / "s")
    folder = tmp_path / "s"
    keys = [path.stem for path in sorted((folder / "color").iterdir())]
    assert keys == [path.stem for path in sorted((folder / "depth").iterdir())]
    assert keys == [path.stem for path in sorted((folder / "pose").iterdir())]
    for index, key in enumerate(keys):
        depth = np.asarray(Image.open(folder / "depth" / f"{key}.png"))
        assert depth.dtype == np.uint16
        np.testing.assert_allclose(depth / 1000, scene.render(index).depth, atol=0.51e-3)
        np.testing.assert_array_equal(np.loadtxt(folder / "pose" / f"{key}.txt"), scene.camera_to_world[index])
    np.testing.assert_array_equal(np.loadtxt(folder / "intrinsics.txt"), scene.intrinsics)
    meta = json.loads((folder / "meta.json").read_text())
    seen = np.array([box["pixels_per_frame"] for box in meta["boxes"]])
    surface = scene.render(2).surface
    assert seen[:, 2].tolist() == [int(np.sum(surface // 6 == b + 1)) for b in range(len(scene.boxes))]


@pytest.mark.alone
def test_rendering_is_fast_enough_for_fifty_scenes_a_minute(tmp_path: Path) -> None:
    """50 scenes x 32 frames in 60 s on 2 cores is 75 ms of one core per frame."""
    start = time.process_time()
    folder = next(render_scenes(tmp_path, 1, workers=1))
    frames = len(list((folder / "color").iterdir()))
    assert (time.process_time() - start) / frames < 0.075


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"frames": 1}, "frames = 1"),
        ({"width": 3}, "3 x 224"),
        ({"field_of_view": 5.0}, "field_of_view = 5.0"),
        ({"min_boxes": 5, "max_boxes": 3}, "min_boxes = 5, max_boxes = 3"),
        ({"width": 10**9, "height": 10**9}, "at most 33,554,432 pixels"),
        ({"frames": 10**9}, "frames = 1000000000: a scene has 2 to 32,768 frames"),
    ],
)
def test_a_bad_configuration_is_named(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SyntheticConfig(**change)


def test_an_absurd_number_of_scenes_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes = 1000000000000: 1 to 1,000,000"):
        next(render_scenes(tmp_path, 10**12))


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, ""])
def test_a_scene_with_a_damaged_meta_is_rendered_again(tmp_path: Path, text: str) -> None:
    config = SyntheticConfig(frames=2, width=32, height=32, samples=1)
    folder = next(render_scenes(tmp_path, 1, config=config))
    whole = (folder / "meta.json").read_bytes()
    (folder / "meta.json").write_text(text)
    next(render_scenes(tmp_path, 1, config=config))
    assert (folder / "meta.json").read_bytes() == whole
