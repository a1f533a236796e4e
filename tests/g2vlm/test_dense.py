"""The fused terms of points and normals on the CPU; `kernels/interpreted/test_surfaces.py` has those of the GPU."""

import pytest
import torch
from support.surfaces import drawn_surfaces, fused_equals_plain, results

from gasp_fast.g2vlm.dense import dense_terms
from gasp_fast.g2vlm.losses import plain_terms
from gasp_fast.kernels import surfaces

pytestmark = pytest.mark.skipif(not surfaces.available(torch.device("cpu")), reason="the C++ extension is not built")

SHAPES = [(3, 2, 11, 13), (1, 1, 2, 2), (2, 3, 1, 5), (1, 2, 40, 1), (4, 1, 30, 30)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("noise", [1e-3, 0.05])
def test_they_equal_plain_pytorch_in_float64(shape, noise):
    fused_equals_plain("cpu", drawn_surfaces(1, *shape, noise))


def test_the_plain_gradient_is_that_of_finite_differences():
    """The judge itself, where no number lies at a kink."""
    predicted, world, *others = drawn_surfaces(3, 1, 1, 3, 4, noise=0.05)
    predicted[:, :, :1, :1] += 0.1
    inputs = predicted.requires_grad_(), world.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: plain_terms(a, b, *others)[0], inputs, eps=1e-7)


def test_threads_and_repetition_change_no_bit():
    threads, arguments, found = torch.get_num_threads(), drawn_surfaces(2, 2, 5, 20, 17, noise=0.02), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(results(dense_terms, arguments, "cpu", torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_every_number_of_a_gradient_is_written(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    fused_equals_plain("cpu", drawn_surfaces(1, *SHAPES[0], 0.02))


def test_a_second_backward_gives_the_same_gradient():
    arguments = [value.float() if value.is_floating_point() else value for value in drawn_surfaces(0, 2, 2, 8, 9, 0.02)]
    local, world = (value.requires_grad_() for value in arguments[:2])
    dense, _ = dense_terms(local, world, *arguments[2:])
    gradients = [torch.autograd.grad(dense.sum() * 3, (local, world), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_only_wanted_gradients_are_computed():
    arguments = [value.float() if value.is_floating_point() else value for value in drawn_surfaces(0, 1, 1, 4, 4, 0.02)]
    with torch.no_grad():
        dense, parts = dense_terms(*arguments)
    assert torch.allclose(dense, parts.sum(0)) and not dense.requires_grad
    world = arguments[1].requires_grad_()
    dense_terms(*arguments)[0].sum().backward()
    assert world.grad is not None and arguments[0].grad is None
