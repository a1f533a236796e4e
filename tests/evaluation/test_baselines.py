"""What PCK is without correspondence, δ_avg and head groups equal loops; chance on LLaVA's grid is 7.9 %."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from evaluation import brute_force

from gasp_fast.evaluation.baselines import Answers, best_constant, chance, most_frequent
from gasp_fast.evaluation.metrics import group_pck
from gasp_fast.evaluation.position_error import delta_avg, pixel_distance

GRIDS = ((4, 6), (5, 3), (4, 4))  # rows, columns


def random_answers(draw: np.random.Generator, count: int, layers: int = 3) -> Answers:
    """On grids of several sizes, with some answers more frequent than others."""
    grid = np.array(GRIDS)[draw.integers(len(GRIDS), size=count)]
    true = (draw.random((count, 2)) * grid[:, ::-1]).astype(int)
    best = (draw.random((layers, count, 2)) ** 2 * grid[:, ::-1]).astype(int)
    return Answers(grid, true, best)


@pytest.fixture
def sequences() -> list[Answers]:
    draw = np.random.default_rng(4)
    return [random_answers(draw, count) for count in (9, 23, 1)]


def constant_pck(sequences: list[Answers], size: tuple[int, int], at: tuple[int, int], radius: float) -> float:
    """PCK of predicting `at` in frames of one grid size, and nothing in the others, in loops."""
    shares = []
    for one in sequences:
        pairs = zip(one.grid.tolist(), one.true.tolist(), strict=True)
        shares.append(
            brute_force.mean([float(tuple(g) == size and math.dist(true, at) <= radius) for g, true in pairs])
        )
    return brute_force.mean(shares)


@pytest.mark.parametrize("radius", [0, 1, 2, 2.5])
def test_chance_is_the_mean_over_all_answers_of_being_right(sequences, radius):
    shares = []
    for one in sequences:
        points = []
        for (rows, columns), true in zip(one.grid.tolist(), one.true.tolist(), strict=True):
            every = [(x, y) for x in range(columns) for y in range(rows)]
            points.append(brute_force.mean([float(math.dist(true, at) <= radius) for at in every]))
        shares.append(brute_force.mean(points))
    assert chance(sequences, radius) == pytest.approx(brute_force.mean(shares))


def test_chance_on_the_grid_of_llava_is_7_9_percent():
    """With true positions anywhere on 12 x 12 tokens."""
    true = np.array([(x, y) for x in range(12) for y in range(12)])
    answers = Answers(np.full((144, 2), 12), true, true[None])
    assert chance([answers], 2) == pytest.approx(1636 / 144**2)
    assert round(100 * chance([answers], 2), 1) == 7.9


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_no_constant_answer_is_better_than_the_best_constant(sequences, radius):
    best = 0.0
    for rows, columns in GRIDS:
        of_token = [
            constant_pck(sequences, (rows, columns), (x, y), radius) for x in range(columns) for y in range(rows)
        ]
        best += max(of_token)
    assert best_constant(sequences, radius) == pytest.approx(best)


def test_the_most_frequent_answer_is_counted_over_all_sequences(sequences):
    for layer, share in enumerate(most_frequent(sequences)):
        counts = Counter(
            (*grid, *best)
            for one in sequences
            for grid, best in zip(one.grid.tolist(), one.best[layer].tolist(), strict=True)
        )
        assert share == counts.most_common(1)[0][1] / sum(counts.values())


def test_a_layer_with_one_answer_repeats_it_always_and_one_without_answers_is_undefined():
    grid, true = np.full((5, 2), 4), np.zeros((5, 2), int)
    constant, none = np.full((5, 2), 3), np.full((5, 2), -1)
    assert most_frequent([Answers(grid, true, np.stack([constant, none]))]) == [1.0, None]


def test_without_points_there_is_no_chance(sequences):
    none = [one.of_points(np.zeros(len(one.true), bool)) for one in sequences]
    assert chance(none, 2) is None and best_constant(none, 2) is None
    some = [sequences[0], none[1]]
    assert chance(some, 2) == chance(sequences[:1], 2) and best_constant(some, 2) == best_constant(sequences[:1], 2)


def test_delta_avg_equals_loops():
    draw = np.random.default_rng(2)
    sequences = [draw.random((2, count)) * 30 for count in (7, 12)]
    expected = [
        brute_force.mean(
            [
                brute_force.mean([float(d < threshold) for d in one[layer].tolist()])
                for one in sequences
                for threshold in (1, 2, 4, 8, 16)
            ]
        )
        for layer in range(2)
    ]
    assert delta_avg(sequences) == pytest.approx(expected)


def test_delta_avg_is_strict_and_undefined_where_a_prediction_is_missing():
    assert delta_avg([np.array([[0.5, 16.0], [np.nan, 0.0]])]) == [0.5, None]


def test_pixel_distances_are_those_of_a_frame_stretched_to_256_x_256():
    """A quarter of the width is 64 pixels, and so is a quarter of the height, whatever the frame's shape."""
    assert pixel_distance(np.array([0.5, 0.25]), np.array([0.25, 0.25])) == 64
    assert pixel_distance(np.array([0.25, 0.25]), np.array([0.25, 0.5])) == 64
    assert pixel_distance(np.array([3, 4]) / 256, np.zeros(2)) == 5


def test_pck_of_head_groups_is_a_mean_over_sequences_and_the_peak_is_the_best_group():
    draw = np.random.default_rng(5)
    correct = [draw.random((2, 3, count)) < 0.5 for count in (4, 11)]
    undefined = np.array([[False, False, False], [False, True, False]])
    got = group_pck(correct, undefined)
    values = {}
    for layer in range(2):
        for group in range(3):
            value = brute_force.mean([brute_force.mean([float(c) for c in one[layer, group]]) for one in correct])
            if undefined[layer, group]:
                assert got["per_layer"][layer][group] is None
            else:
                values[layer, group] = value
                assert got["per_layer"][layer][group] == pytest.approx(value)
    assert got["mean_per_layer"] == [pytest.approx(brute_force.mean([values[0, g] for g in range(3)])), None]
    assert got["peak"] == pytest.approx(max(values.values()))
    assert values[got["peak_layer"], got["peak_group"]] == pytest.approx(got["peak"])
