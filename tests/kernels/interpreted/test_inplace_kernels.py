"""Rotary embedding and SwiGLU in place, against float64."""

import pytest
import torch
import torch.nn.functional as F

from gasp_fast.kernels.inplace_kernels import rotate_in_place, swiglu_in_place, usable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tolerance(dtype, device):
    """Of results rounded once. The interpreter cuts digits of bf16 off instead of rounding."""
    digits = torch.finfo(dtype).eps
    return max(digits if dtype == torch.bfloat16 and device == "cpu" else digits / 2, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("patches", "heads", "width"), [(37, 16, 80), (5, 1, 6), (1, 3, 64), (130, 2, 20)])
def test_rotary_embedding_turns_queries_and_keys_and_leaves_values(device, dtype, patches, heads, width):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(patches, 3, heads, width, generator=generator).to(dtype).to(device)
    angle = (torch.rand(patches, width // 2, generator=generator) * 50).repeat(1, 2).to(device)
    cos, sin = angle.cos(), angle.sin()
    first, second = qkv.double().chunk(2, dim=-1)
    c, s = (factor[:, None, None, : width // 2].double() for factor in (cos, sin))
    expected = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    values = qkv[:, 2].clone()
    rotate_in_place(qkv, cos, sin)
    assert torch.equal(qkv[:, 2], values)
    size = torch.hypot(first, second).repeat(1, 1, 1, 2)[:, :2]  # of the pair; its parts may cancel
    difference = (qkv[:, :2].double() - expected[:, :2]).abs() / size
    assert difference.max() <= tolerance(dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3456), (1, 1), (7, 301), (2, 2048)])
def test_swiglu_is_the_product_rounded_once(device, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(2, *shape, generator=generator) * 4).to(dtype).to(device).unbind()
    gate = gate.clone()
    expected = F.silu(gate.double()) * up.double()
    swiglu_in_place(gate, up)
    torch.testing.assert_close(gate.double(), expected, rtol=tolerance(dtype, device), atol=1e-6)


def test_gates_of_zero_stay_zero(device):
    gate, up = torch.zeros(64, device=device), torch.zeros(64, device=device)
    swiglu_in_place(gate, up)
    assert not gate.any()


def test_what_needs_a_gradient_is_not_overwritten(device):
    frozen, trained = torch.zeros(3, device=device), torch.zeros(3, device=device, requires_grad=True)
    assert usable(frozen, frozen)
    assert not usable(frozen, trained)
