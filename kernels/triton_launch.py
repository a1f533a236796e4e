"""Declares and launches Triton kernels: `kernel`, `Tile`, `launch`.

This module also imports without Triton: kernels are then plain Python functions that are never called, and `launch`
raises an error that says what to install.

Tile sizes are fixed, so that two runs give the same bits and the first step is as fast as the last. They are defined
beside the kernels they belong to, each with its reason. `GASP_FAST_AUTOTUNE=1` lets Triton time other numbers of warps
and stages (`Tile.neighbours`) and store the fastest in its cache on disk. Sums may then be taken in another order than
with the fixed ones, but always in the same one for as long as the cache exists.
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

INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Numbers that change from batch to batch. Triton would compile a kernel anew for a value of 1 and for multiples of 16.
# That makes these kernels no faster, and a run would compile again and again during its first hundred steps.
VARYING = {"rows", "frames", "tokens", "matches", "longest", "first_token", "row_scale_g", "token_scale_g", "inverse_g"}
VARYING |= {"positive_g", "term_g", "corr_weight_g", "depth_weight_g"}


def constant(value: float) -> Any:
    """A global number that kernels read. The compiler accepts only `constexpr`; the interpreter takes plain numbers."""
    return value if tl is None or INTERPRETED else tl.constexpr(value)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton, the function itself."""
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=[name for name in signature(function).parameters if name in VARYING])


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function that `launch` starts on the device, and the names of the arguments it writes to."""

    function: Any
    writes: tuple[str, ...]


def kernel(*writes: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a kernel. An argument may be `None`: Triton then compiles the kernel without what depends on it."""
    return lambda function: Kernel(jit(function), writes)


@dataclass(frozen=True)
class Tile:
    """The part of the similarity matrix that one program computes at a time, and with how many warps."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1  # loads in flight of a pipelined loop

    def neighbours(self) -> list[Tile]:
        """The candidates of autotuning. Rows and columns stay: grids and block tables depend on them."""
        stages = sorted({max(1, self.stages - 1), self.stages, self.stages + 1})
        return [replace(self, warps=warps, stages=count) for warps in (1, 2, 4, 8) for count in stages]


def launch(kernel: Kernel, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    """Run a kernel: `arguments` in the order of its signature, then its constants; those of the tile are added here."""
    if triton is None:
        raise ImportError("backend 'triton' needs Triton: pip install triton, or use backend='torch'")
    if 0 in grid:
        return
    constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    with torch.cuda.device_of(next(value for value in arguments if isinstance(value, Tensor))):
        if autotuning():
            absent = {name for name, value in zip(kernel.function.arg_names, arguments, strict=False) if value is None}
            _autotuned(kernel, tile, frozenset(absent))[grid](*arguments, **constants)
        else:
            kernel.function[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


def autotuning() -> bool:
    return os.environ.get("GASP_FAST_AUTOTUNE", "0") not in ("", "0") and not INTERPRETED


@cache
def _autotuned(kernel: Kernel, tile: Tile, absent: frozenset[str]) -> Any:
    """Timed once per set of constants (widths, dtypes, switches) and of absent arguments. What a kernel writes is
    restored between trials, because it may write where it reads."""
    configs = [triton.Config({}, num_warps=t.warps, num_stages=t.stages) for t in tile.neighbours()]
    constants = [p.name for p in kernel.function.params if p.is_constexpr]
    written = [name for name in kernel.writes if name not in absent]
    return triton.autotune(configs, key=constants, restore_value=written, cache_results=True)(kernel.function)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def cdiv(size: int, block: int) -> int:
    """`size / block`, rounded up."""
    return -(-size // block)


def dense_inner(values: Tensor) -> Tensor:
    """The same values with unit stride in the last dimension: a view where possible; for small vectors only."""
    return values if values.stride(-1) == 1 or values.shape[-1] < 2 else values.contiguous()
