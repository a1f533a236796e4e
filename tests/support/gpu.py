"""Tests on a GPU: where they run, and the numbers of one forward and backward pass, which a CPU must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda")
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CPU = torch.device("cpu")
# Relative to fp32 on a CPU, by what the model computes in. On a GPU the convolution that cuts frames into patches
# rounds to TF32, whose numbers have 11 bits: 5e-4. bfloat16 has 8 bits, 4e-3, and rounds in each layer: on a CPU the
# terms of these tests are up to 6e-3 away, and the gradients 0.18.
TERMS = {"fp32": 2e-3, "bf16": 2e-2}
GRADIENTS = {"fp32": 1e-2, "bf16": 0.3}

Terms = dict[str, Tensor]


def step_on(device: torch.device, model: nn.Module, step: Callable[[torch.device], Mapping[str, Any]]) -> Terms:
    """The terms that `step` returns, and the `gradient` of its `loss` as one vector; all on the CPU, in float64."""
    model.to(device)
    model.zero_grad(set_to_none=True)
    terms = step(device)
    terms["loss"].backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    found = {name: term.detach().double().cpu() for name, term in terms.items() if isinstance(term, Tensor)}
    return {**found, "gradient": torch.cat(gradients)}


def assert_agree(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str = "fp32") -> None:
    """Of `pck` only that it is a share: a rounding decides between tokens that are equally similar."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "pck":
            assert ((found[name] >= 0) & (found[name] <= 1.001)).all()
            continue
        error = float((found[name] - value).norm() / value.norm().clamp(min=1e-3))
        limit = GRADIENTS[dtype] if name == "gradient" else TERMS[dtype]
        assert error <= limit, f"{name}: {error:.2g} away from the CPU, at most {limit}"


def assert_finite(record: Mapping[str, Any]) -> None:
    """All numbers of a log line."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    assert numbers and all(map(math.isfinite, numbers.values())), record
