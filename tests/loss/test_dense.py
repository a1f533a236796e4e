"""The dense reference against the definition in loops, and its gradient against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from support.problems import loss_in_loops, problems, random_problem, relative_error

import gasp_fast

TWO_SEQUENCES = [[4, 1, 3], [2, 5]]


@settings(max_examples=300, deadline=None)
@given(problems(largest_frame=5, widths=(1, 4, 7)))
def test_reference_is_the_definition(problem):
    out = gasp_fast.gasp_loss(
        problem.embeddings, problem.matches, problem.temperature, problem.negatives, backend="torch"
    )
    truth = loss_in_loops(problem)
    assert float(out.loss) == pytest.approx(truth["loss"], rel=1e-6, abs=1e-9)
    assert out.corr_per_layer.tolist() == pytest.approx(truth["corr_per_layer"], rel=1e-6, abs=1e-9)
    assert out.depth_per_layer.tolist() == pytest.approx(truth["depth_per_layer"], rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(problems(largest_frame=4, widths=(3,)))
def test_unreduced_terms_are_those_of_each_match(problem):
    out = gasp_fast.gasp_loss(
        problem.embeddings, problem.matches, problem.temperature, problem.negatives, reduction="none", backend="torch"
    )
    truth = loss_in_loops(problem)
    shape = (len(problem.embeddings), len(problem.matches))
    assert out.loss.shape == out.corr.shape == out.depth.shape == shape
    # Of a size of 1: with a single candidate the loss is zero, and -1e-16 in another order of operations.
    assert relative_error(out.corr, torch.tensor(truth["corr"], dtype=torch.float64).view(shape), natural=1.0) < 1e-6
    assert relative_error(out.depth, torch.tensor(truth["depth"], dtype=torch.float64).view(shape), natural=1.0) < 1e-6
    assert torch.allclose(out.loss, 0.3 * out.corr + out.depth)


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reference_passes_gradcheck(negatives, reduction):
    problem = random_problem(3, TWO_SEQUENCES, layers=2, width=5, matches=9)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def loss(embeddings, tau):
        out = gasp_fast.gasp_loss(embeddings, problem.matches, tau, negatives, reduction=reduction, backend="torch")
        return out.loss, out.corr, out.depth

    assert torch.autograd.gradcheck(loss, (problem.embeddings.requires_grad_(), temperature))


def test_reference_can_be_differentiated_twice():
    problem = random_problem(3, TWO_SEQUENCES, layers=1, width=4, matches=5)

    def loss(embeddings):
        return gasp_fast.gasp_loss(embeddings, problem.matches, 0.3, backend="torch").loss

    assert torch.autograd.gradgradcheck(loss, (problem.embeddings.requires_grad_(),))
