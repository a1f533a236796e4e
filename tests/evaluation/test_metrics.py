"""Metrics equal an independent computation, planted predictions are recovered exactly, undefined metrics are None."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation import brute_force

from gasp_fast import Matches
from gasp_fast.evaluation.matching import Matcher
from gasp_fast.evaluation.metrics import Outcomes, calibration_gap, correlation, summary, within

COLUMNS, ROWS, FRAMES = 7, 6, 4
TOKENS = COLUMNS * ROWS


def grid_matches(anchor: torch.Tensor, target: torch.Tensor, sequences: int = 1) -> Matches:
    xy = torch.stack(torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")[::-1], -1).reshape(-1, 2)
    return Matches(
        frame_offsets=torch.arange(sequences * FRAMES + 1) * TOKENS,
        sequence_offsets=torch.arange(sequences + 1) * FRAMES,
        anchor=anchor,
        target=target,
        token_xy=xy.repeat(sequences * FRAMES, 1),
    )


def random_matches(seed: int, sequences: int, count: int) -> Matches:
    """Anchors in the first frame of their sequence, targets in others."""
    draw = torch.Generator().manual_seed(seed)
    sequence = torch.randint(sequences, (count,), generator=draw).sort().values
    anchor = sequence * FRAMES * TOKENS + torch.randint(TOKENS, (count,), generator=draw)
    target = sequence * FRAMES * TOKENS + torch.randint(TOKENS, FRAMES * TOKENS, (count,), generator=draw)
    return grid_matches(anchor, target, sequences)


def correct_of(matches: Matches, best: torch.Tensor) -> np.ndarray:
    xy = matches.token_xy.numpy()
    return within(xy[best.numpy()], xy[matches.target.numpy()], 2.0)


@pytest.mark.parametrize("same", [True, False], ids=["one-table", "queries-and-keys"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_predictions_on_random_features_equal_brute_force(same, sequences):
    matches = random_matches(sequences, sequences, 60)
    keys = torch.randn(matches.tokens, 12)
    queries = keys if same else torch.randn(matches.tokens, 12)
    best, confidence = Matcher(matches, 0.07, keys.device)(queries, keys)
    expected_best, expected_confidence, correct = brute_force.predictions(queries, keys, matches, 0.07)
    assert best.tolist() == expected_best
    assert confidence.tolist() == pytest.approx(expected_confidence, rel=1e-4)
    assert correct_of(matches, best).tolist() == correct


def test_a_sequence_without_matches_between_others_changes_nothing():
    matches = grid_matches(torch.tensor([3, 2 * FRAMES * TOKENS + 5]), torch.tensor([50, 2 * FRAMES * TOKENS + 90]), 3)
    queries, keys = torch.randn(matches.tokens, 8), torch.randn(matches.tokens, 8)
    best, _ = Matcher(matches, 0.07, keys.device)(queries, keys)
    assert best.tolist() == brute_force.predictions(queries, keys, matches, 0.07)[0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_planted_features_give_exactly_the_planted_pck(share):
    """Each anchor shares its direction with one token: its target, or one in the opposite corner of the frame."""
    count = 20
    anchor = torch.arange(count)
    # Targets in the left two columns of frame 1; wrong predictions are put in its last column, 3 columns away at least.
    target = TOKENS + (torch.arange(count) % ROWS) * COLUMNS + torch.arange(count) // ROWS % 2
    wrong = TOKENS + (torch.arange(count) % ROWS) * COLUMNS + COLUMNS - 1
    matches = grid_matches(anchor, target)
    is_correct = torch.arange(count) < share * count
    features = torch.zeros(matches.tokens, 2 * TOKENS * FRAMES)
    features[torch.arange(matches.tokens), torch.arange(matches.tokens)] = 1.0  # every token a direction of its own
    features[anchor] = features[torch.where(is_correct, target, wrong)]
    best, _ = Matcher(matches, 0.07, features.device)(features, features)
    outcomes = Outcomes(
        correct_of(matches, best)[None], np.ones((1, count), np.float32), np.ones(count, int), np.ones(count, bool)
    )
    metrics = summary([outcomes], [1], 3)
    assert metrics["pck"]["per_layer"] == [share]
    assert metrics["pck_moved"]["per_layer"] == [share]
    assert metrics["identity"] == 0.0


@pytest.mark.parametrize(
    ("offset", "is_correct"), [((2, 0), True), ((0, -2), True), ((1, 1), True), ((2, 1), False), ((3, 0), False)]
)
def test_correct_means_at_most_two_patches_away(offset, is_correct):
    assert within(np.array([5, 5]), np.array([5, 5]) + offset, 2.0) == is_correct


def test_pck_is_a_mean_over_sequences_not_over_points():
    few = Outcomes(np.array([[True]]), np.array([[0.5]], np.float32), np.array([1]), np.array([True]))
    many = Outcomes(np.zeros((1, 9), bool), np.full((1, 9), 0.1, np.float32), np.ones(9, int), np.ones(9, bool))
    metrics = summary([few, many], [1], 2)
    assert metrics["pck"]["per_layer"] == [0.5] and metrics["pck"]["per_layer_std"] == [0.5]


def test_moved_points_and_identity_are_separate_metrics():
    correct = np.array([[True, True, False, False]])
    moved = np.array([True, False, True, False])
    metrics = summary([Outcomes(correct, np.ones((1, 4), np.float32), np.ones(4, int), moved)], [1], 2)
    assert metrics["pck"]["per_layer"] == [0.5]
    assert metrics["pck_moved"]["per_layer"] == [0.5] and metrics["pck_moved"]["share"] == 0.5
    assert metrics["identity"] == 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_rho_is_one_when_confidence_is_correctness(sign):
    """To a few units in the last place: how float64 sums round depends on the CPU."""
    correct = np.array([True, False, True, True, False])
    confidence = np.where(correct, 0.5 + 0.25 * sign, 0.5 - 0.25 * sign).astype(np.float32)
    assert correlation(confidence, correct) == pytest.approx(sign, rel=4 * np.finfo(np.float64).eps)
    assert calibration_gap(confidence, correct) == sign * 0.5


def test_rho_equals_pearson_in_loops():
    draw = np.random.default_rng(1)
    confidence, correct = draw.random(200).astype(np.float32), draw.random(200) < 0.4
    expected = brute_force.pearson([float(c) for c in confidence], correct.tolist())
    assert correlation(confidence, correct) == pytest.approx(expected, abs=1e-12)
    assert correlation(confidence, correct) == pytest.approx(np.corrcoef(confidence, correct)[0, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "correct"),
    [
        ([0.1, 0.1, 0.1], [True, False, True]),  # 0.1 in float32 has no exact mean: must not become rounding noise
        ([0.1, 0.2, 0.3], [True, True, True]),
        ([0.1, 0.2, 0.3], [False, False, False]),
        ([], []),
    ],
)
def test_rho_of_degenerate_predictions_is_undefined(confidence, correct):
    assert correlation(np.array(confidence, np.float32), np.array(correct, bool)) is None


def test_rho_of_constant_features_is_undefined():
    matches = random_matches(3, 2, 40)
    features = torch.ones(matches.tokens, 16) * torch.rand(matches.tokens, 1).add(0.5)  # lengths differ, directions not
    best, confidence = Matcher(matches, 0.07, features.device)(features, features)
    correct = correct_of(matches, best)
    assert correct.any() and not correct.all()
    assert correlation(confidence.numpy(), correct) is None


def test_undefined_metrics_are_null_in_json():
    all_right = Outcomes(
        np.ones((2, 3), bool), np.full((2, 3), 0.9, np.float32), np.array([2, 2, 3]), np.zeros(3, bool)
    )
    text = json.dumps(summary([all_right], [1, 2], 4), allow_nan=False)
    metrics = json.loads(text)
    assert metrics["rho"] == {"per_layer": [None, None], "per_layer_std": [None, None]}
    assert metrics["calibration_gap"]["per_layer"] == [None, None]
    assert metrics["pck_moved"]["per_layer"] == [None, None]
    assert metrics["temporal"]["pck"] == [None, 1.0, 1.0, None]
    assert metrics["temporal"]["normalized"] == [None] * 4  # nothing at gap 1 to compare with
    assert metrics["identity"] == 1.0


def test_relative_pck_is_undefined_where_that_at_gap_one_is_zero():
    correct = np.array([[False, True]])
    metrics = summary([Outcomes(correct, np.ones((1, 2), np.float32), np.array([1, 2]), np.ones(2, bool))], [1], 2)
    assert metrics["temporal"]["pck"] == [0.0, 1.0] and metrics["temporal"]["normalized"] == [None, None]


def test_temporal_metrics_equal_brute_force_and_are_of_the_best_layer():
    draw = np.random.default_rng(0)
    sequences = []
    for count in (11, 17, 5):
        correct = draw.random((3, count)) < np.array([0.2, 0.9, 0.5])[:, None]
        sequences.append(
            Outcomes(
                correct,
                draw.random((3, count)).astype(np.float32),
                draw.integers(1, 5, count),
                draw.random(count) < 0.5,
            )
        )
    metrics = summary(sequences, [10, 11, 12], 5)
    assert metrics["pck"]["peak_layer"] == 11 and metrics["temporal"]["layer"] == 11
    for gap in range(1, 6):
        per_sequence, layer_means = [], []
        for one in sequences:
            here = [m for m in range(len(one.gap)) if one.gap[m] == gap]
            if here:
                per_sequence.append(brute_force.mean([float(one.correct[1, m]) for m in here]))
                layer_means.append(brute_force.mean([float(one.correct[layer, m]) for layer in range(3) for m in here]))
        got = metrics["temporal"]["pck"][gap - 1]
        if not per_sequence:
            assert got is None and metrics["temporal"]["sequences"][gap - 1] == 0
            continue
        assert got == pytest.approx(brute_force.mean(per_sequence))
        assert metrics["temporal"]["pck_std"][gap - 1] == pytest.approx(brute_force.deviation(per_sequence))
        assert metrics["temporal"]["normalized"][gap - 1] == pytest.approx(got / metrics["temporal"]["pck"][0])
        mean = metrics["temporal"]["mean_over_layers"]["pck"]
        assert mean[gap - 1] == pytest.approx(brute_force.mean(layer_means))
