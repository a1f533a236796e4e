"""The nearest rotation and its gradient, also where singular values are equal."""

import math

import pytest
import torch

from gasp_fast.g2vlm.rotation import angle_between, nearest_rotation


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(count, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nearest_rotation(matrix)


def about_x(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)


def with_singular_values(*values: float) -> torch.Tensor:
    return rotations(2, seed=3) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotations(2, seed=4)


MATRICES = {
    "rotations": rotations(3),
    "any": torch.randn(4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "equal singular values": with_singular_values(2, 2, 2),
    "nearly equal": with_singular_values(2, 2 - 1e-9, 2 - 2e-9),
    "two equal": with_singular_values(3, 1, 1),
    "singular": with_singular_values(3, 1, 0),
    "reflections": with_singular_values(3, 2, -1),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_the_gradient_is_that_of_finite_differences(kind):
    assert torch.autograd.gradcheck(nearest_rotation, (MATRICES[kind].clone().requires_grad_(),), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", MATRICES)
def test_it_is_a_rotation_and_no_other_is_nearer(kind):
    matrix = MATRICES[kind]
    found = nearest_rotation(matrix)
    assert torch.allclose(found @ found.mT, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.linalg.det(found), torch.ones((), dtype=torch.float64))
    distance = (matrix - found).square().sum((-1, -2))
    for other in rotations(200, seed=5):
        assert ((matrix - other).square().sum((-1, -2)) >= distance - 1e-9).all()


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(3, 3),
        torch.ones(3, 3),
        -torch.eye(3),
        torch.diag(torch.tensor([1.0, -1e-20, 1e-20])),
        1e-30 * torch.eye(3),
    ],
    ids=["zero", "rank 1", "reflection with equal values", "nearly rank 1", "tiny"],
)
def test_gradients_are_finite_where_the_nearest_rotation_jumps(matrix):
    leaf = matrix.clone().requires_grad_()
    nearest_rotation(leaf).backward(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_16_bit_matrices_give_float32_rotations():
    assert nearest_rotation(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.float32


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        nearest_rotation(torch.zeros(3, 4))


@pytest.mark.parametrize("angle", [0.0, 1e-8, 0.3, 1.5, 3.0, math.pi])
def test_the_angle_is_exact_and_its_gradient_finite(angle):
    a = rotations(1)[0]
    b = (a @ about_x(angle)).requires_grad_()
    found = angle_between(a, b)
    found.backward()
    assert found.item() == pytest.approx(angle, abs=1e-12)
    assert b.grad is not None and b.grad.isfinite().all()
