"""The Triton kernel for points and normals."""

import pytest
import torch
from support.surfaces import drawn_surfaces, fused_equals_plain, results

from gasp_fast.g2vlm.dense import dense_terms
from gasp_fast.kernels import surfaces


@pytest.mark.parametrize("shape", [(3, 2, 11, 13), (1, 1, 2, 2), (1, 2, 1, 5), (1, 1, 9, 1)], ids=str)
@pytest.mark.parametrize("noise", [1e-3, 0.05])
def test_it_equals_plain_pytorch_in_float64(device, poisoned_memory, shape, noise):
    fused_equals_plain(device, drawn_surfaces(1, *shape, noise))


def test_it_repeats_bitwise(device):
    arguments = drawn_surfaces(2, 2, 2, 12, 17, noise=0.02)
    first, second = (results(dense_terms, arguments, device, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_angle_is_that_of_atan2_up_to_90_degrees(device):
    launch_angles = pytest.importorskip("triton")
    import triton.language as tl

    @launch_angles.jit
    def angles(sine, cosine, out, count: tl.constexpr):
        i = tl.arange(0, count)
        tl.store(out + i, surfaces.angle_of(tl.load(sine + i), tl.load(cosine + i)))

    exact = torch.linspace(0, 3.14, 4096, dtype=torch.float64)
    sine, cosine, out = exact.sin().float(), exact.cos().float(), torch.empty(4096)
    angles[(1,)](sine.to(device), cosine.to(device), out := out.to(device), 4096)
    expected = torch.atan2(sine.double(), cosine.double()).clamp(max=torch.pi / 2)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=3e-7, atol=1e-12)
