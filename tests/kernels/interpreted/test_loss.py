"""`gasp_loss(backend="triton")` from end to end: the tests that every backend has to pass, on small shapes.

At tau = 0.05 a log-sum-exp is about 20, where float32 has steps of 2e-6. The temperature's gradient, a difference of
numbers of 1 / tau^2, then comes close to the allowed error; so the problems are the same in each run.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import EXACT, assert_agrees, run
from support.problems import problems, random_problem

import gasp_fast
from gasp_fast.kernels import products


@pytest.fixture(autouse=True, scope="module")
def folded_at_every_width():
    """As on a GPU, where one block has all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "LEAST_FOLDED_WIDTH", 1)
        yield


@pytest.mark.timeout(900)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(largest_frame=4, widths=(1, 3, 8), most=(1, 2, 3, 9)))
def test_agrees_with_float64(problem):
    assert_agrees(problem, torch.float32, EXACT, "triton")


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(largest_frame=4, widths=(8,), most=(2, 2, 3, 9)), st.sampled_from(["sum", "none"]))
def test_agrees_with_float64_under_every_reduction(problem, reduction):
    assert_agrees(problem, torch.float32, EXACT, "triton", reduction=reduction)


def test_two_runs_agree_to_the_last_bit():
    problem = random_problem(0, [[9, 4, 1], [5, 7]], width=24, matches=40)
    first, second = (run(problem, problem.embeddings.float(), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_layers_of_a_stack_are_those_computed_alone():
    """Memory, views and launch arguments of one layer are used again for the next."""
    problem = random_problem(1, [[5, 3, 1], [4, 3]], width=8, matches=20, layers=3)
    scales = torch.tensor([1.0, 3.0, 0.2])[:, None, None]
    layers = problem.embeddings.float() * scales
    together = layers.clone().requires_grad_()
    stack = gasp_fast.gasp_loss(
        together, problem.matches, reduction="sum", layer_weights=torch.ones(3), backend="triton"
    )
    stack.loss.backward()
    assert together.grad is not None
    for number, layer in enumerate(layers):
        alone = layer.clone().requires_grad_()
        out = gasp_fast.gasp_loss(alone, problem.matches, reduction="sum", backend="triton")
        out.loss.backward()
        assert alone.grad is not None
        assert torch.equal(alone.grad, together.grad[number])
        assert out.corr_per_layer == stack.corr_per_layer[number]
        assert out.depth_per_layer == stack.depth_per_layer[number]


def test_frame_match_is_that_of_the_reference():
    problem = random_problem(0, [[9, 4, 1], [5, 7]], width=24, matches=40)
    matches = problem.matches
    found, truth = (
        gasp_fast.frame_match(
            problem.embeddings.to(dtype),
            torch.tensor([3, 0, 22, 3]),
            matches.frame_offsets,
            values=torch.rand(26, 3, generator=torch.Generator().manual_seed(0)).to(dtype),
            sequence_offsets=matches.sequence_offsets,
            backend=backend,
        )
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch"))
    )
    assert torch.equal(found.best, truth.best)
    assert torch.allclose(found.lse.double(), truth.lse, rtol=1e-5)
    assert torch.allclose(found.expected.double(), truth.expected, atol=1e-5)


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("where", ["anchor", "target", "candidate"])
def test_a_nan_in_any_token_that_takes_part_reaches_the_loss(negatives, where):
    """Token 2 is the anchor, token 5 in the second frame its target, 6 one more candidate in the target's frame."""
    matches = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, 4, 8, 11]), anchor=torch.tensor([2]), target=torch.tensor([5]),
        target_depth=torch.tensor([2.0]), patch_depth=torch.ones(11),
    )  # fmt: skip
    embeddings = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0))
    embeddings[1, {"anchor": 2, "target": 5, "candidate": 6}[where], 3] = float("nan")
    out = gasp_fast.gasp_loss(embeddings, matches, negatives=negatives, backend="triton")
    assert out.corr_per_layer.isnan().tolist() == [False, True]
    assert out.depth_per_layer.isnan().tolist() == [False, True]
    assert out.loss.isnan()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_in_a_metric_a_zero_row_stays_finite_and_a_nan_reaches_the_loss(value):
    problem = random_problem(0, [[9, 4, 1], [5, 7]], width=8, matches=20, metric=True)
    embeddings, metric = problem.embeddings.float(), problem.metric.float()
    embeddings[1, problem.matches.anchor[0]] = value
    embeddings.requires_grad_()
    out = gasp_fast.gasp_loss(gasp_fast.in_metric(embeddings, metric), problem.matches, backend="triton")
    assert out.corr_per_layer.isnan().tolist() == [False, value != 0]
    (gradient,) = torch.autograd.grad(out.loss, embeddings)
    assert gradient.isfinite().all() == (value == 0)


@pytest.mark.parametrize("depth", [1e18, 3e38])
def test_the_largest_depth_is_a_number_and_a_larger_one_is_unknown(depth):
    offsets, anchor, target = torch.tensor([0, 4, 8, 11]), torch.tensor([2, 3]), torch.tensor([5, 9])
    matches = gasp_fast.Matches(
        frame_offsets=offsets, anchor=anchor, target=target, target_depth=torch.tensor([depth, 2.0]),
        patch_depth=torch.full((11,), depth),
    )  # fmt: skip
    embeddings = torch.randn(1, 11, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, matches, backend="triton")
    (gradient,) = torch.autograd.grad(out.loss, embeddings)
    truth = gasp_fast.gasp_loss(embeddings.double(), matches, backend="torch")
    (expected,) = torch.autograd.grad(truth.loss, embeddings)
    assert torch.allclose(out.loss.double(), truth.loss, rtol=1e-5) and (out.depth > 0) == (depth <= 1e18)
    assert torch.allclose(gradient, expected, atol=1e-6)
