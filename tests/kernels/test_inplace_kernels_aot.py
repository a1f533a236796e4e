"""The kernels of the vision tower compile for Hopper as they are launched, load 16 bytes at once and do not spill."""

import pytest
import torch

pytest.importorskip("triton")

from gasp_fast.benchmarking.ahead_of_time import compile_for_hopper
from gasp_fast.kernels import inplace_kernels
from gasp_fast.kernels.triton_launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing in its interpreter")


def test_rotary_embedding_and_swiglu_of_the_7b_model(monkeypatch):
    compiled = {}

    def compile_instead(kernel, grid, tile, *arguments, form, **constants):
        compiled[kernel.function.__name__] = compile_for_hopper(kernel, tile, arguments, constants)

    monkeypatch.setattr(inplace_kernels, "launch", compile_instead)
    angles = torch.zeros(64, 80)
    inplace_kernels.rotate_in_place(torch.zeros(64, 3, 16, 80, dtype=torch.bfloat16), angles, angles)
    inplace_kernels.swiglu_in_place(*torch.zeros(2, 64, 3456, dtype=torch.bfloat16))
    assert compiled.keys() == {"rotate_heads", "swiglu"}
    for code in compiled.values():
        assert code.spill_bytes == 0 and code.registers <= 96
        assert code.count("LDG.E.128") == code.count("LDG") > 0
        assert code.count("STG.E.128") == code.count("STG") > 0
