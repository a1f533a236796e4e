"""A visible point is where the track puts it, and both implementations give the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.random_views import random_views

from gasp_fast.data.tracks.build import Views, build_tracks, grid_queries, load_views, track_points

pytest.importorskip("gasp_fast._tracks", reason="the extension is not built: pip install -e .")

BACKENDS = pytest.mark.parametrize("backend", ["numpy", "cpp"])


def check_by_hand(scene, frames, grid, backend):
    """The recipe in scalar arithmetic, written independently; checks every point in every frame, visible or not."""
    tracks = build_tracks(scene, frames, grid=grid, backend=backend)
    assert len(tracks) >= 8 and tracks.visible[:, 1:].any()
    query_camera, query_pose = scene.intrinsics(frames[0]), scene.pose(frames[0])
    query_map = scene.depth(frames[0])
    assert tracks.visible[:, 0].all()
    for t in range(len(tracks)):
        u, v = tracks.query[t]
        d = float(query_map[int(v), int(u)])
        assert d > 0 and tracks.depth[t, 0] == d and (tracks.uv[t, 0] == (u, v)).all()
        local = d * np.linalg.solve(query_camera, [u, v, 1.0])
        world = np.linalg.solve(query_pose, [*local, 1.0])
        for f, index in enumerate(frames):
            if f == 0:
                continue
            x, y, z, _ = scene.pose(index) @ world
            assert math.isclose(z, tracks.depth[t, f], rel_tol=1e-9, abs_tol=1e-9)
            if z <= 0:
                assert not tracks.visible[t, f]
                continue
            pixel = scene.intrinsics(index) @ [x / z, y / z, 1.0]
            np.testing.assert_allclose(tracks.uv[t, f], pixel[:2], rtol=1e-9, atol=1e-7)
            width, height = scene.image_size(index)
            if not (4 <= pixel[0] <= width - 4 and 4 <= pixel[1] <= height - 4):
                assert not tracks.visible[t, f]
                continue
            left, top = math.floor(pixel[0] - 0.5), math.floor(pixel[1] - 0.5)
            around = [float(scene.depth(index)[top + r, left + c]) for r in (0, 1) for c in (0, 1)]
            apart = min((abs(z - d) / min(z, d) for d in around if d > 0), default=math.inf)
            assert tracks.visible[t, f] == (apart < 0.05) or math.isclose(apart, 0.05, rel_tol=1e-9)
    seen = tracks.visible.sum(axis=1)
    assert (seen >= 2).all() and (np.diff(seen) <= 0).all()
    assert len(tracks) == math.ceil(0.5 * len(build_tracks(scene, frames, grid=grid, keep=1.0)))


@pytest.mark.parametrize("grid", [8, 24])
@pytest.mark.parametrize("backend", ["numpy", "cpp"])
def test_every_point_of_a_recorded_scene_passes_an_independent_check(scene_real, backend, grid):
    check_by_hand(scene_real, [3, 4, 8, 0, 15, 23], grid, backend)


@pytest.mark.parametrize("grid", [8, 24])
@pytest.mark.parametrize("backend", ["numpy", "cpp"])
def test_every_point_of_an_exact_scene_passes_an_independent_check(scene_boxes, backend, grid):
    check_by_hand(scene_boxes, [2, 5, 0, 7], grid, backend)


def test_tracks_agree_with_the_exact_positions_and_visibility(scene_world, scene_boxes):
    frames = list(range(scene_world.frames))
    tracks = build_tracks(scene_boxes, frames, grid=24, keep=1.0)
    distance = scene_world.distance(scene_world.centre(0), scene_world.rays(0, tracks.query))
    world = scene_world.centre(0) + scene_world.rays(0, tracks.query) * distance[:, None]
    wrong = total = hidden = 0
    for f in frames[1:]:
        pixel, z = scene_world.project(f, world)
        assert np.abs(tracks.uv[:, f] - pixel).max() < 0.5
        np.testing.assert_allclose(tracks.depth[:, f], z, atol=2e-3)
        truth = scene_world.visible(f, world)
        wrong += int((truth != tracks.visible[:, f]).sum())
        hidden += int((~truth).sum())
        total += len(tracks)
    assert hidden > 0.02 * total  # there is something to get wrong
    assert wrong <= 0.01 * total


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("grid", [1, 7, 24, "dense"])
def test_compiled_and_reference_tracks_are_equal_to_the_last_bit(seed, grid):
    views = random_views(seed)
    query = grid_queries(views, grid)
    for keep in (0.5, 1.0, 0.3):
        reference = track_points(query, views, keep, backend="numpy")
        for threads in (1, 3):
            ours = track_points(query, views, keep, threads=threads, backend="cpp")
            for name in ("query", "uv", "visible", "depth"):
                mine, theirs = getattr(ours, name), getattr(reference, name)
                assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
                assert mine.tobytes() == theirs.tobytes(), name


def test_the_random_views_contain_the_hard_cases():
    drawn = [random_views(seed) for seed in range(12)]
    found = [tracks for tracks in (track_points(grid_queries(v, "dense"), v, 1.0) for v in drawn) if len(tracks)]
    assert len(found) > 6
    assert any((tracks.depth <= 0).any() for tracks in found)  # behind the camera
    assert any(0.1 < tracks.visible[:, 1:].mean() < 0.9 for tracks in found)
    assert any(d.shape[0] < height for v in drawn for d, (_, height) in zip(v.depth, v.size, strict=True))


def test_recorded_scenes_give_the_same_bits(scene_real):
    frames = list(range(0, 48, 4))
    for grid in (8, "dense"):
        reference = build_tracks(scene_real, frames, grid, backend="numpy")
        ours = build_tracks(scene_real, frames, grid, backend="cpp", threads=2)
        assert ours.uv.tobytes() == reference.uv.tobytes() and ours.visible.tobytes() == reference.visible.tobytes()


def test_two_runs_give_the_same_bits(scene_boxes):
    first, second = (build_tracks(scene_boxes, range(8), "dense", threads=4) for _ in range(2))
    assert first.uv.tobytes() == second.uv.tobytes()


def flat_views(frames: int, depth: float = 2.0, size: tuple[int, int] = (64, 48), step: float = 0.0) -> Views:
    """A wall; the camera moves `step` pixels to the right from frame to frame."""
    width, height = size
    camera = np.array([[64.0, 0, width / 2], [0, 64.0, height / 2], [0, 0, 1]])  # powers of two: no rounding
    pose = np.tile(np.eye(4), (frames, 1, 1))
    pose[:, 0, 3] = -np.arange(frames) * step * depth / 64.0
    maps = [np.full((height, width), depth, np.float32) for _ in range(frames)]
    return Views(
        maps, np.tile(camera, (frames, 1, 1)), pose, np.tile([[width, height]], (frames, 1)), np.arange(frames)
    )


@BACKENDS
def test_queries_are_at_cell_centres(backend):
    views = flat_views(2)
    tracks = track_points(grid_queries(views, 4), views, 1.0, backend=backend)
    assert sorted(map(tuple, tracks.query.tolist())) == sorted(
        (8.0 + 16 * c, 6.0 + 12 * r) for r in range(4) for c in range(4)
    )


@BACKENDS
def test_points_closer_than_four_pixels_to_the_edge_are_not_visible(backend):
    views = flat_views(2)
    query = np.array([[4.0, 24.0], [3.99, 24.0], [60.0, 24.0], [60.01, 24.0], [32.0, 4.0], [32.0, 3.99], [32.0, 44.01]])
    tracks = track_points(query, views, 1.0, backend=backend)
    assert tracks.query.tolist() == [[4.0, 24.0], [60.0, 24.0], [32.0, 4.0]]


@BACKENDS
@pytest.mark.parametrize(("other", "seen"), [(2.09, True), (2.101, False), (1.906, True), (1.9, False), (0.0, False)])
def test_depths_agree_within_five_percent_of_the_smaller(backend, other, seen):
    views = flat_views(2)
    views.depth[1][:] = other
    tracks = track_points(np.array([[32.0, 24.0]]), views, 1.0, backend=backend)
    assert len(tracks) == int(seen)


@BACKENDS
def test_one_of_the_four_pixels_around_is_enough(backend):
    for row, column in ((23, 30), (23, 31), (24, 30), (24, 31)):
        views = flat_views(2)
        views.depth[1][:] = 0
        views.depth[1][row, column] = 2.0
        query = np.array([[31.0, 24.0], [31.0, 24.9], [31.9, 24.0], [33.0, 24.0], [31.0, 26.0]])
        tracks = track_points(query, views, 1.0, backend=backend)
        around = [
            q.tolist()
            for q in query
            if row - math.floor(q[1] - 0.5) in (0, 1) and column - math.floor(q[0] - 0.5) in (0, 1)
        ]
        assert tracks.query.tolist() == around and around


@BACKENDS
def test_the_most_visible_half_is_kept_ties_by_index(backend):
    views = flat_views(6, step=8.0)  # the further left a point, the sooner it leaves the image
    query = np.array([[x, 20.0] for x in (6.0, 20.0, 30.0, 40.0, 55.0, 41.0)])
    everything = track_points(query, views, 1.0, backend=backend)
    assert everything.query[:, 0].tolist() == [55.0, 40.0, 41.0, 30.0, 20.0]  # 6.0 is seen once
    assert everything.visible.sum(axis=1).tolist() == [6, 5, 5, 4, 3]
    assert track_points(query, views, 0.5, backend=backend).query[:, 0].tolist() == [55.0, 40.0, 41.0]


@BACKENDS
def test_points_behind_a_camera_are_invisible_and_finite(backend):
    views = flat_views(3)
    views.pose[2, :3, :3] = np.diag([-1.0, 1.0, -1.0])  # looks back
    tracks = track_points(grid_queries(views, 4), views, 1.0, backend=backend)
    assert len(tracks) == 16 and not tracks.visible[:, 2].any()
    assert (tracks.depth[:, 2] < 0).all() and (tracks.uv[:, 2] == -1).all()


@BACKENDS
def test_a_point_in_the_plane_of_a_camera_gives_no_track(backend):
    views = flat_views(2)
    views.pose[1, 2, 3] = -2.0
    tracks = track_points(np.array([[32.0, 24.0]]), views, 1.0, backend=backend)
    assert len(tracks) == 0


@BACKENDS
def test_empty_inputs_give_empty_tracks(backend):
    views = flat_views(2)
    assert track_points(np.zeros((0, 2)), views, backend=backend).uv.shape == (0, 2, 2)
    assert track_points(grid_queries(views, 4), flat_views(1), backend=backend).uv.shape == (0, 1, 2)
    views.depth[0][:] = 0
    assert track_points(grid_queries(views, 4), views, backend=backend).visible.shape == (0, 2)


def test_dense_means_every_pixel(scene_boxes):
    views = load_views(scene_boxes, [0, 1])
    query = grid_queries(views, "dense")
    width, height = scene_boxes.image_size(0)
    assert len(query) == width * height
    assert query[0].tolist() == [0.5, 0.5] and query[-1].tolist() == [width - 0.5, height - 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 0}, "grid = 0"),
        ({"grid": "fine"}, "grid = 'fine'"),
        ({"keep": 0.0}, "keep = 0.0"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"frames": []}, r"frames = \[\]"),
        ({"threads": 0}, "threads = 0"),
        ({"backend": "gpu"}, "backend = 'gpu'"),
    ],
)
def test_bad_arguments_are_named(scene_boxes, changes, message):
    with pytest.raises(ValueError, match=message):
        build_tracks(scene_boxes, **{"frames": [0, 1], **changes})


def test_queries_outside_the_first_image_are_named():
    with pytest.raises(ValueError, match=r"query\[1\] = \[64.0, 3.0\] is outside the first image"):
        track_points(np.array([[3.0, 3.0], [64.0, 3.0]]), flat_views(2))
    with pytest.raises(ValueError, match=r"query\[0\]"):
        track_points(np.array([[np.nan, 3.0]]), flat_views(2))


def test_views_of_unequal_length_are_named():
    views = flat_views(3)
    with pytest.raises(ValueError, match="pose has shape"):
        Views(views.depth, views.intrinsics, views.pose[:2], views.size)
