"""The scale that aligns a prediction is the exact minimum, for every sample of a batch at once."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from gasp_fast.g2vlm.scale import aligning_scale, best_scale, evenly_chosen


def cost(scale: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[...] scales -> [...]."""
    return (weight * (scale[..., None] * predicted - true).abs()).sum(-1)


def least_cost(predicted: torch.Tensor, true: torch.Tensor, weight: torch.Tensor) -> float:
    """A piecewise linear function has its minimum at one of its breakpoints."""
    counts = predicted != 0
    breakpoints = torch.cat([true[counts] / predicted[counts], torch.ones(1, dtype=torch.float64)])
    return float(cost(breakpoints, predicted, true, weight).min())


# Few different numbers: ties, zeros and weights of 0 are frequent.
NUMBERS = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, 0.5, 3.0, -7.0])
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS, st.sampled_from([0.0, 0.25, 1.0, 1.0, 4.0])), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_no_breakpoint_is_better(rows):
    predicted, true, weight = torch.tensor(rows, dtype=torch.float64).T
    scale = best_scale(predicted[None], true[None], weight[None])
    assert float(cost(scale, predicted, true, weight)) == pytest.approx(
        least_cost(predicted, true, weight), rel=1e-12, abs=1e-12
    )


def test_rows_of_a_batch_do_not_touch_each_other():
    generator = torch.Generator().manual_seed(0)
    predicted, true = torch.randn(2, 5, 300, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, 300, generator=generator, dtype=torch.float64)
    weight[2] = 0
    together = best_scale(predicted, true, weight)
    alone = torch.cat([best_scale(predicted[i : i + 1], true[i : i + 1], weight[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    for row in range(5):
        found = float(cost(together[row : row + 1], predicted[row], true[row], weight[row]))
        assert found == pytest.approx(least_cost(predicted[row], true[row], weight[row]), rel=1e-12)


def test_of_equally_good_scales_the_smallest_is_taken():
    assert best_scale(torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), torch.ones(1, 2)).tolist() == [1.0]


@pytest.mark.parametrize("predicted", [[[1.0, 2.0]], [[0.0, 0.0]]])
def test_nothing_to_align_leaves_the_scale_at_one(predicted):
    weight = torch.tensor([[0.0, 0.0]]) if predicted[0][0] else torch.ones(1, 2)
    assert best_scale(torch.tensor(predicted), torch.tensor([[3.0, 4.0]]), weight).tolist() == [1.0]


def test_fewer_valid_points_than_asked_for_are_each_chosen_once():
    valid = torch.tensor([[False, True, True, False, True], [False] * 5, [True] * 5])
    position, chosen = evenly_chosen(valid, 4)
    assert [position[row][chosen[row]].tolist() for row in range(3)] == [[1, 2, 4], [], [0, 1, 2, 3]]


def test_chosen_points_are_valid_different_and_spread_over_the_whole_row():
    valid = torch.rand(3, 5000, generator=torch.Generator().manual_seed(1)) < 0.5
    position, chosen = evenly_chosen(valid, 100)
    assert chosen.all() and valid.gather(1, position).all()
    steps = valid.cumsum(1).gather(1, position).diff(dim=1)  # in valid points
    assert int(steps.min()) >= 24 and int(steps.max()) <= 26


def test_a_sample_of_points_recovers_a_known_scale_among_outliers_and_unknown_points():
    generator = torch.Generator().manual_seed(2)
    predicted = torch.randn(2, 9000, 3, generator=generator)
    true = predicted * torch.tensor([2.5, 0.5])[:, None, None]
    true[:, ::4] = 50.0  # a quarter is wrong
    weight = torch.ones(2, 9000)
    weight[:, 1::4], true[:, 1::4] = 0, float("nan")
    assert aligning_scale(predicted, true, weight).tolist() == pytest.approx([2.5, 0.5], rel=1e-6)
