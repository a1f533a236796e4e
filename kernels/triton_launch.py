"""How the Triton kernels are launched: guarded import, tile sizes, one call.

Importing this page never fails: without Triton the kernels are ordinary Python functions that nobody calls, and
`launch` says what to install. It knows no kernel.

Tile sizes are fixed, so that two runs give the same bits and the first step is as fast as the last. They stand beside
the kernels they belong to, each with its reason. `GASP_FAST_AUTOTUNE=1` lets Triton time other numbers of warps and
stages (`Tile.neighbours`) and keeps the winners on disk, in Triton's cache. Sums may then be taken in another order
than with the fixed ones, but always in the same one for as long as the cache is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = tl = None

# Numbers that change from batch to batch. Triton would compile a kernel anew for a value of 1 and for multiples of 16;
# nothing is gained by it here, and the first hundred steps of a run would be spent compiling.
VARYING = {"rows", "frames", "tokens", "matches", "longest", "first_token", "row_scale_g", "token_scale_g", "inverse_g"}
VARYING |= {"positive_g", "term_g", "corr_scale_g", "depth_scale_g"}


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or nothing at all where there is no Triton."""
    if triton is None:
        return kernel
    return triton.jit(kernel, do_not_specialize=[name for name in signature(kernel).parameters if name in VARYING])


INTERPRETED = triton is not None and triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tile:
    """The part of the similarity matrix that one program holds at a time, and who works on it."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1  # loads in flight of a pipelined loop

    def neighbours(self) -> list[Tile]:
        """What autotuning tries. Rows and columns decide about grids and block tables, so they stay."""
        deeper = sorted({max(1, self.stages - 1), self.stages, self.stages + 1})
        return [replace(self, warps=warps, stages=stages) for warps in (1, 2, 4, 8) for stages in deeper]


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any], written: tuple[str, ...]) -> None:
    """Run `kernel` with `BLOCK_ROWS` and `BLOCK_COLUMNS` of the tile. `written` are the arguments it writes to."""
    if triton is None:
        raise ImportError("backend 'triton' needs Triton: pip install triton, or use backend='torch'")
    if 0 in grid:
        return
    arguments = arguments | {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        if autotuning():
            _autotuned(kernel, tile, written)[grid](**arguments)
        else:
            kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)


def autotuning() -> bool:
    return os.environ.get("GASP_FAST_AUTOTUNE", "0") not in ("", "0") and not INTERPRETED


@cache
def _autotuned(kernel: Any, tile: Tile, written: tuple[str, ...]) -> Any:
    """Timed once per set of constants (widths, dtypes, switches). What a kernel writes is put back between trials,
    because it may write where it reads."""
    configs = [triton.Config({}, num_warps=t.warps, num_stages=t.stages) for t in tile.neighbours()]
    constants = [p.name for p in kernel.params if p.is_constexpr]
    return triton.autotune(configs, key=constants, restore_value=list(written), cache_results=True)(kernel)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def cdiv(size: int, block: int) -> int:
    return -(-size // block)


def dense_inner(values: Tensor) -> Tensor:
    """The same values with unit stride in the last dimension; for small vectors only, a copy where need be."""
    return values if values.stride(-1) == 1 or values.shape[-1] < 2 else values.contiguous()
