"""The mixture has exact shares, draws every sample once an epoch, and resumes exactly at any position."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gasp_fast.data.mixture import BLOCK, Mixture, Source
from gasp_fast.data.permutation import permuted

MIXTURE = Mixture({"geometry": Source(700, 0.6), "qa": Source(90, 0.4)}, seed=3)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 300), key=st.text(max_size=5))
def test_a_permutation_hits_every_number_once(length: int, key: str) -> None:
    assert sorted(permuted(i, length, key) for i in range(length)) == list(range(length))


def test_permutations_of_different_keys_are_unrelated() -> None:
    first, second = ([permuted(i, 1000, key) for i in range(1000)] for key in "ab")
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 12
    assert sum(a == i for i, a in enumerate(first)) < 12


def test_shares_are_exact_in_every_block() -> None:
    for block in (0, 1, 17):
        counts = Counter(MIXTURE.draw(block * BLOCK + place).source for place in range(BLOCK))
        assert counts == {"geometry": 600, "qa": 400}


def test_shares_are_approximate_in_every_hundred_positions() -> None:
    sources = [MIXTURE.draw(position).source for position in range(2000)]
    for start in range(0, 2000, 100):
        assert 40 <= sources[start : start + 100].count("geometry") <= 80


def test_every_sample_comes_once_an_epoch_in_a_new_order_each_time() -> None:
    draws = [MIXTURE.draw(position) for position in range(3 * BLOCK)]
    walks: dict[tuple[str, int], list[int]] = {}
    for draw in draws:
        walks.setdefault((draw.source, draw.epoch), []).append(draw.index)
    assert sorted(walks["geometry", 0]) == sorted(walks["geometry", 1]) == list(range(700))
    assert sorted(walks["qa", 11]) == list(range(90))
    assert walks["qa", 0] != walks["qa", 1] != sorted(walks["qa", 1])


def test_resuming_at_any_position_goes_on_exactly() -> None:
    whole = [MIXTURE.draw(position) for position in range(2500)]
    for start in (0, 1, 999, 1000, 1723):
        fresh = Mixture({"geometry": Source(700, 0.6), "qa": Source(90, 0.4)}, seed=3)
        assert [fresh.draw(position) for position in range(start, start + 50)] == whole[start : start + 50]


def test_the_seed_changes_the_order() -> None:
    other = Mixture(MIXTURE.sources, seed=4)
    assert [other.draw(p) for p in range(20)] != [MIXTURE.draw(p) for p in range(20)]


def test_uneven_weights_are_met_to_a_thousandth() -> None:
    mixture = Mixture({"a": Source(5, 1), "b": Source(5, 1), "c": Source(5, 1)})
    assert sum(mixture.quota.values()) == BLOCK
    assert all(333 <= places <= 334 for places in mixture.quota.values())


def test_a_source_of_weight_zero_never_comes() -> None:
    mixture = Mixture({"a": Source(5, 1), "b": Source(5, 0)})
    assert {mixture.draw(position).source for position in range(BLOCK)} == {"a"}


def test_an_epoch_ends_within_its_positions() -> None:
    end = MIXTURE.positions_of_epoch("geometry")
    assert {d.index for d in map(MIXTURE.draw, range(end)) if d.source == "geometry"} == set(range(700))
    assert end == 2 * BLOCK


def test_a_position_far_ahead_costs_no_more_than_the_first() -> None:
    draw = MIXTURE.draw(10**12)
    assert draw.epoch == 600 * 10**9 // 700 if draw.source == "geometry" else 400 * 10**9 // 90


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Mixture({}), "at least one"),
        (lambda: Mixture({"a": Source(0)}), "a.length = 0"),
        (lambda: Mixture({"a": Source(3, -1)}), "a.weight = -1"),
        (lambda: Mixture({"a": Source(3, float("nan"))}), "a.weight = nan"),
        (lambda: Mixture({"a": Source(3, 1), "b": Source(3, 1e-5)}), "b.weight = 1e-05"),
        (lambda: MIXTURE.positions_of_epoch("video"), "'video'"),
        (lambda: permuted(5, 5, ""), "index = 5"),
    ],
)
def test_bad_input_is_named(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
