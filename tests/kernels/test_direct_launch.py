"""What reaches the driver when a direct kernel is started. Nothing is compiled here."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gasp_fast.kernels import triton_launch
from gasp_fast.kernels.triton_launch import Compiled, Kernel, Tile

pytestmark = pytest.mark.skipif(triton_launch.INTERPRETED, reason="Triton's interpreter starts kernels in another way")

STREAM, FUNCTION, METADATA = 7, "function", "metadata"


@pytest.mark.parametrize(("grid", "started"), [((5,), (5, 1, 1)), ((5, 6), (5, 6, 1)), ((5, 6, 7), (5, 6, 7))])
def test_a_grid_of_any_rank_and_addresses_in_the_place_of_tensors(
    grid: tuple[int, ...], started: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    ready = Compiled(None, lambda *v: calls.append(v), FUNCTION, METADATA, lambda _: STREAM, 0, (0, 2), (16, 32))
    monkeypatch.setattr(triton_launch, "_compile", lambda *_: ready)
    first, last = torch.zeros(3), torch.zeros(2)
    kernel = Kernel(None, (), direct=True)
    for _ in range(2):  # the second time it is found
        triton_launch.launch(kernel, grid, Tile(16, 32), first, 11, last)
    values = (first.data_ptr(), 11, last.data_ptr(), 16, 32)
    assert calls == [(*started, STREAM, FUNCTION, METADATA, None, None, None, *values)] * 2
    assert len(kernel.compiled) == 1


def test_an_empty_grid_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compile", lambda *_: pytest.fail("compiled"))
    triton_launch.launch(Kernel(None, (), direct=True), (0,), Tile(16, 32), torch.zeros(1))
