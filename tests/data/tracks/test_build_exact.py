"""Tracks from depth maps against exact geometry: within half a pixel, and visible where the exact points are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from support.exact_scene import exact_tracks

from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, SyntheticScene, make_scene, render_scenes
from gasp_fast.data.tracks.build import Views, build_tracks, track_points
from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler

# With 7-pixel cells the grid's cell centres are pixel centres, where depth maps are exact up to the millimetre of the
# depth file. So the remaining differences come from the recipe itself.
GRID = 32
SCENES = 8

# Two depths agree if they differ by less than 5 % of the smaller. So the recipe misses an occluder at depth D in front
# of a point at z if z - D < 0.05 D, that is if D > z / 1.05: if it is nearer by less than 4.8 % of z. This is intended,
# because real depth is noisy. One test ignores exactly these occluders and allows 1 % of wrong decisions; another
# compares with the exact geometry, ignores none, and allows 2 %.
IGNORED = 1 - 1 / 1.05


class Pair(NamedTuple):
    scene: Scene
    truth: SyntheticScene
    frames: tuple[int, ...]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    sampler = SequenceSampler([32] * SCENES, SequenceConfig(per_scene=2))

    def found() -> Iterator[Pair]:
        config = SyntheticConfig(samples=1)
        for number, folder in enumerate(render_scenes(tmp_path_factory.mktemp("scenes"), SCENES, config=config)):
            for index in (2 * number, 2 * number + 1):
                yield Pair(open_scene(folder), make_scene(number, config), sampler.draw(0, index).frames)

    return list(found())


def test_a_written_scene_reads_back_as_it_was_made(pairs: list[Pair]) -> None:
    scene, truth, _ = pairs[0]
    assert scene.format == "rgbd" and len(scene) == len(truth) and scene.has_depth
    for index in (0, 31):
        np.testing.assert_allclose(scene.pose(index), np.linalg.inv(truth.camera_to_world[index]), atol=1e-9)
        np.testing.assert_allclose(scene.intrinsics(index), truth.intrinsics, atol=1e-9)
        np.testing.assert_allclose(scene.depth(index), truth.render(index).depth, atol=0.51e-3)
        assert np.abs(scene.image(index).astype(int) - truth.render(index).image).mean() < 6  # JPEG


def test_tracks_lie_within_half_a_pixel_of_the_truth(pairs: list[Pair]) -> None:
    checked = 0
    for scene, truth, frames in pairs:
        tracks = build_tracks(scene, frames, grid=GRID, keep=1.0)
        exact = exact_tracks(truth, frames, tracks.query)
        error = np.linalg.norm(tracks.uv - exact.uv, axis=-1)[tracks.visible & exact.visible]
        assert error.max() < 0.5
        np.testing.assert_allclose(tracks.depth[tracks.visible], exact.depth[tracks.visible], rtol=2e-3)
        checked += error.size
    assert checked > 50_000


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_visibility_agrees_with_the_truth_within_one_percent(pairs: list[Pair], keep: float) -> None:
    """Share of all decisions. The exact tracks ignore the same occluders as the recipe, see IGNORED."""
    wrong = total = seen = 0
    for scene, truth, frames in pairs:
        tracks = build_tracks(scene, frames, grid=GRID, keep=keep)
        exact = exact_tracks(truth, frames, tracks.query, tolerance=IGNORED)
        wrong += np.sum(tracks.visible != exact.visible)
        seen += np.sum(exact.visible)
        total += tracks.visible.size
    assert wrong / total < 0.01
    assert 0.3 < seen / total < 0.9  # both cases occur


def test_exactly_the_occluders_that_the_recipe_misses_are_ignored() -> None:
    """A wall at depth 1: the recipe accepts a point behind it up to 1 / (1 - IGNORED), and no further."""
    hidden_at = 1 / (1 - IGNORED)
    camera = np.array([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]])
    wall = np.ones((16, 16), np.float32)
    views = Views([wall, wall], np.stack([camera] * 2), np.stack([np.eye(4)] * 2), np.array([[16, 16]] * 2))
    for depth, accepted in ((hidden_at * 0.999, True), (hidden_at * 1.001, False)):
        behind = replace(views, depth=[wall * np.float32(depth), wall])
        assert len(track_points(np.array([[8.0, 8.0]]), behind, keep=1.0)) == int(accepted)


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_with_no_occluder_ignored_at_most_two_percent_of_decisions_are_wrong(pairs: list[Pair], keep: float) -> None:
    """Measured when this was written: 0.8 % for all tracks, 1.1 % for the kept half, nearly all of them at occluders
    that the recipe misses."""
    wrong = missed = total = 0
    for scene, truth, frames in pairs:
        tracks = build_tracks(scene, frames, grid=GRID, keep=keep)
        exact = exact_tracks(truth, frames, tracks.query)
        wrong += np.sum(tracks.visible & ~exact.visible)
        missed += np.sum(~tracks.visible & exact.visible)
        total += tracks.visible.size
    assert (wrong + missed) / total < 0.02
    assert missed / total < 0.002


def test_occlusion_is_common_enough_to_matter(pairs: list[Pair]) -> None:
    """Without hidden points inside the image, visibility would depend on the image's edges alone."""
    hidden = inside = 0
    for _, truth, frames in pairs:
        y, x = np.mgrid[7:224:14, 7:224:14] + 0.5
        exact = exact_tracks(truth, frames, np.stack([x.ravel(), y.ravel()], axis=-1))
        in_view = (exact.depth > 0) & np.all((exact.uv >= 4) & (exact.uv <= 220), axis=-1)
        hidden += np.sum(in_view & ~exact.visible)
        inside += np.sum(in_view)
    assert 0.05 < hidden / inside < 0.4
