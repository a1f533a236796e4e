"""Scaling gradients in place, against PyTorch."""

import pytest
import torch

from gasp_fast.kernels.scaling import place_scaled, scale_in_place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7, 3), (3, 5, 1024), (2, 4097, 1), (1000, 8)])
@pytest.mark.parametrize("of_layers", [True, False])
@pytest.mark.parametrize("number", [1.0, 0.0, -1.7, float("nan")])
def test_is_the_product_rounded_once(device, dtype, shape, of_layers, number):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype).to(device)
    layers = shape[0] if of_layers and len(shape) == 3 else 1
    factor = torch.full((layers,), number, device=device) * torch.arange(1, layers + 1, device=device)
    expected = (values.float() * factor.view(layers, *[1] * (values.dim() - 1))).to(dtype)
    scale_in_place(values, factor)
    if dtype == torch.bfloat16 and device == "cpu":  # the interpreter cuts digits off instead of rounding
        assert torch.allclose(values.float(), expected.float(), rtol=2**-7, equal_nan=True)
    else:
        assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_values_are_left_alone_where_the_factor_is_one(device):
    values = torch.randn(3, 100, device=device)
    before = values.clone()
    scale_in_place(values, torch.ones(1, device=device))
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (5, 24), (7, 1030), (0, 8)])
def test_rows_are_scaled_on_their_way(device, dtype, count, width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 2 * width, generator=generator).to(device, dtype)[:, :width]
    index = torch.randperm(12, generator=generator)[:count].to(device)
    factor = torch.tensor(-1.7, device=device)
    out, expected = (torch.full((12, width), 3.0, dtype=dtype, device=device) for _ in range(2))
    expected[index] = (rows.float() * factor).to(dtype)
    place_scaled(rows, factor, index, out)
    if dtype == torch.bfloat16 and device == "cpu":  # as above
        assert torch.allclose(out.float(), expected.float(), rtol=2**-7)
    else:
        assert torch.equal(out, expected)
