"""The dense backend against the definition, and its gradient against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_agrees
from support.problems import problems, random_problem, relative_error

import gasp_fast
from gasp_fast.loss.naive import naive_loss

TWO_SEQUENCES = [[4, 1, 3], [2, 5]]


@settings(max_examples=300, deadline=None)
@given(problems(largest_frame=5, widths=(1, 4, 7)), st.sampled_from(["mean", "sum", "none"]))
def test_dense_in_float64_is_the_definition(problem, reduction):
    assert_agrees(problem, torch.float64, 1e-12, "torch", reduction=reduction)


@settings(max_examples=30, deadline=None)
@given(problems(largest_frame=4, widths=(3,)))
def test_unreduced_terms_are_those_of_each_match(problem):
    options = {"temperature": problem.temperature, "negatives": problem.negatives}
    out = gasp_fast.gasp_loss(problem.embeddings, problem.matches, **options, reduction="none", backend="torch")
    truth = naive_loss(problem.embeddings, problem.matches, **options)
    assert out.loss.shape == (len(problem.embeddings), len(problem.matches))
    # Of a size of 1: with a single candidate the loss is zero, and -1e-16 in another order of operations.
    assert relative_error(out.corr, truth.corr, natural=1.0) < 1e-6
    assert relative_error(out.depth, truth.depth, natural=1.0) < 1e-6
    assert torch.allclose(out.loss, 0.3 * out.corr + out.depth)


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense_passes_gradcheck(negatives, reduction):
    problem = random_problem(3, TWO_SEQUENCES, layers=2, width=5, matches=9)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def loss(embeddings, tau):
        out = gasp_fast.gasp_loss(
            embeddings, problem.matches, temperature=tau, negatives=negatives, reduction=reduction, backend="torch"
        )
        return out.loss, out.corr, out.depth

    assert torch.autograd.gradcheck(loss, (problem.embeddings.requires_grad_(), temperature))


def test_dense_can_be_differentiated_twice():
    problem = random_problem(3, TWO_SEQUENCES, layers=1, width=4, matches=5)

    def loss(embeddings):
        return gasp_fast.gasp_loss(embeddings, problem.matches, temperature=0.3, backend="torch").loss

    assert torch.autograd.gradgradcheck(loss, (problem.embeddings.requires_grad_(),))
