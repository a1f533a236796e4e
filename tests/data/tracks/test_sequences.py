"""The sampler has the paper's distribution and no state, and the held-out split never moves a scene."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler, is_held_out

LONG = SequenceSampler([400] * 50, SequenceConfig(per_scene=100))


def test_a_sequence_starts_with_its_anchor_and_stays_in_the_window() -> None:
    for index in range(0, len(LONG), 7):
        anchor, *others = LONG.draw(0, index).frames
        assert others == sorted(set(others)) and anchor not in others
        assert all(0 <= frame < 400 and abs(frame - anchor) <= 48 for frame in others)
        assert 8 <= 1 + len(others) <= 24


def test_frame_counts_and_offsets_are_uniform() -> None:
    sequences = [LONG.draw(0, index).frames for index in range(len(LONG))]
    counts = np.array([Counter(map(len, sequences))[f] for f in range(8, 25)])
    expected = len(LONG) / 17
    assert ((counts - expected) ** 2 / expected).sum() < 39.3  # chi-square, 16 degrees of freedom, p = 0.001
    inner = [s for s in sequences if 48 <= s[0] < 352]  # window not clipped by the ends of the scene
    offsets = Counter(frame - s[0] for s in inner for frame in s[1:])
    assert set(offsets) == set(range(-48, 49)) - {0}
    counts = np.array(list(offsets.values()))
    # Draws without repetition vary less than independent ones, so the chi-square bound holds all the more.
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 140.9  # 95 degrees of freedom, p = 0.001


def test_anchors_are_uniform_over_the_scene() -> None:
    anchors = np.array([LONG.draw(0, index).frames[0] for index in range(len(LONG))])
    counts = np.bincount(anchors // 20, minlength=20)
    expected = len(LONG) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # 19 degrees of freedom, p = 0.001


def test_any_sequence_can_be_drawn_alone_and_after_a_pickle() -> None:
    in_order = [LONG.draw(2, index) for index in range(50)]
    fresh = pickle.loads(pickle.dumps(SequenceSampler([400] * 50, SequenceConfig(per_scene=100))))
    assert [fresh.draw(2, index) for index in reversed(range(50))] == in_order[::-1]


def test_seed_and_epoch_change_the_draws_and_nothing_else_does() -> None:
    base = LONG.draw(0, 5)
    assert LONG.draw(1, 5) != base
    assert SequenceSampler([400] * 50, SequenceConfig(per_scene=100, seed=1)).draw(0, 5) != base
    assert SequenceSampler([400] * 99, SequenceConfig(per_scene=100)).draw(0, 5) == base


def test_draws_never_change_between_versions() -> None:
    """Resumed runs and existing annotations rely on exactly these numbers."""
    sampler = SequenceSampler([60, 32], SequenceConfig(per_scene=2, seed=7))
    assert sampler.draw(0, 0).frames == (29, 13, 22, 23, 43, 49, 50, 52)


def test_every_scene_is_drawn_equally_often() -> None:
    sampler = SequenceSampler([30, 300, 9], SequenceConfig(per_scene=5))
    assert [sampler.draw(0, index).scene for index in range(len(sampler))] == [0] * 5 + [1] * 5 + [2] * 5


def test_a_short_scene_gives_all_its_frames_and_is_counted() -> None:
    sampler = SequenceSampler([10], SequenceConfig(per_scene=200))
    assert max(len(sampler.draw(0, index).frames) for index in range(200)) == 10
    statistics = sampler.statistics(0)
    # The number of frames is drawn without regard to the scene's length: a long scene gives all of them.
    long = SequenceSampler([400], sampler.config)
    assert statistics.shortened == sum(len(long.draw(0, index).frames) > 10 for index in range(200)) > 100


def test_epoch_statistics_count_what_is_drawn() -> None:
    sampler = SequenceSampler([200, 40], SequenceConfig(per_scene=30))
    statistics = sampler.statistics(3)
    drawn = [sampler.draw(3, index) for index in range(60)]
    assert statistics.sequences == 60
    assert statistics.frames == sum(len(s.frames) for s in drawn)
    assert statistics.frames_per_sequence == dict(sorted(Counter(len(s.frames) for s in drawn).items()))
    gaps = [abs(frame - s.frames[0]) for s in drawn for frame in s.frames[1:]]
    assert statistics.mean_gap == pytest.approx(np.mean(gaps))
    assert statistics.coverage == len({(s.scene, frame) for s in drawn for frame in s.frames}) / 240
    assert "60 sequences" in str(statistics)
    some = sampler.statistics(3, at_most=20)
    assert some.sequences == 20 and some.frames == sum(len(drawn[3 * number].frames) for number in range(20))


def test_planning_two_million_sequences_stores_nothing_per_sequence() -> None:
    """1.75 million sequences of 10,000 scenes: the state is four bytes a scene."""
    sampler = SequenceSampler([350] * 10_000, SequenceConfig(per_scene=175))
    assert len(sampler) == 1_750_000
    assert len(pickle.dumps(sampler)) < 4 * 10_000 + 1000
    assert sampler.draw(2, 1_749_999).scene == 9_999


def test_the_split_depends_on_the_name_alone() -> None:
    """The last line fixes the scenes: a version that moves one from testing to training invalidates comparisons."""
    names = [f"{n:064x}" for n in range(4000)]
    held_out = {name for name in names if is_held_out(name, 0.05)}
    assert 0.04 < len(held_out) / len(names) < 0.06
    assert held_out <= {name for name in names if is_held_out(name, 0.2)}  # a larger share keeps the smaller one
    assert not any(is_held_out(name, 0) for name in names) and all(is_held_out(name, 1) for name in names)
    assert [n for n in range(100) if is_held_out(f"scene-{n:06d}", 0.05)] == [1, 6, 19, 29, 38, 54, 59, 76]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SequenceConfig(min_frames=1), "min_frames = 1"),
        (lambda: SequenceConfig(min_frames=9, max_frames=8), "max_frames = 8"),
        (lambda: SequenceConfig(window=5), "window = 5"),
        (lambda: SequenceConfig(per_scene=0), "per_scene = 0"),
        (lambda: SequenceSampler([]), "lengths is empty"),
        (lambda: SequenceSampler([50, 5], names=["a", "b"]), "b has 5 frames"),
        (lambda: is_held_out("a", 1.5), "share = 1.5"),
    ],
)
def test_bad_input_is_named(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("index", [-1, 5000])
def test_an_index_outside_the_epoch_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"index = {index}"):
        LONG.draw(0, index)
