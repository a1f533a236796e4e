"""Declares and launches Triton kernels: `kernel`, `Tile`, `launch`.

This module also imports without Triton: kernels are then plain Python functions that are never called, and `launch`
raises an error that says what to install.

Triton's own launch binds names, inspects every argument and searches its cache, which costs several times as much as
the start of a kernel. A kernel declared `direct` is compiled once for each set of argument types and constants and then
started without all that. No number or address of its arguments is compiled in: what a kernel may assume about them is
one of its constants. So batches of new sizes never compile anything again.

Tile sizes are fixed, so that two runs give the same bits and the first step is as fast as the last. They are defined
beside the kernels they belong to, each with its reason. `GASP_FAST_AUTOTUNE=1` lets Triton time other numbers of warps
and stages (`Tile.neighbours`) and store the fastest in its cache on disk. Sums may then be taken in another order than
with the fixed ones, but always in the same one for as long as the cache exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch

from . import replay

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # CPU builds of torch come without it
    triton = tl = libdevice = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
_hooks: Any = None if triton is None else triton.knobs.runtime
AUTOTUNED = os.environ.get("GASP_FAST_AUTOTUNE", "0") not in ("", "0") and not INTERPRETED

# Numbers that change from batch to batch. Triton would compile a kernel anew for a value of 1 and for multiples of 16.
# That makes these kernels no faster, and a run would compile again and again during its first hundred steps.
VARYING = {"rows", "frames", "tokens", "matches", "longest", "first_token", "row_scale_g", "token_scale_g", "inverse_g"}
VARYING |= {"positive_g", "term_g", "corr_weight_g", "depth_weight_g"}


def constant(value: float) -> Any:
    """A global number that kernels read. The compiler accepts only `constexpr`; the interpreter takes plain numbers."""
    return value if tl is None or INTERPRETED else tl.constexpr(value)


def jit(function: Callable[..., Any], direct: bool = False) -> Any:
    """`triton.jit`; without Triton, the function itself."""
    if triton is None:
        return function
    varying = [
        name
        for name, parameter in signature(function).parameters.items()
        if name in VARYING or (direct and "constexpr" not in str(parameter.annotation))
    ]
    return triton.jit(function, do_not_specialize=varying)


@dataclass(slots=True)
class Compiled:
    """A kernel for one form of its arguments and one set of constants, loaded on a device."""

    of_triton: Any  # a CompiledKernel
    run: Any  # starts it, given the next two, a grid, a stream and its arguments
    function: Any
    metadata: Any
    current_stream: Any  # of a device
    device: int
    tensors: tuple[int, ...]  # their positions among the arguments
    constants: tuple[Any, ...]  # in the order of the signature

    def start(self, x: int, y: int, z: int, values: list[Any]) -> None:
        """Start it with the values of all its arguments; those of tensors are addresses."""
        enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
        if (enter and enter.calls) or (leave and leave.calls):  # a profiler watches launches
            self.of_triton[x, y, z](*values)
            return
        # As Triton starts a kernel, but for what it prepares for profilers.
        self.run(x, y, z, self.current_stream(self.device), self.function, self.metadata, None, None, None, *values)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function that `launch` starts on the device, and the names of the arguments it writes to."""

    function: Any
    writes: tuple[str, ...]
    direct: bool
    compiled: dict[tuple[Any, ...], Compiled] = field(default_factory=dict)


def kernel(*writes: str, direct: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a kernel. An argument may be `None`: Triton then compiles the kernel without what depends on it.

    The first argument is a tensor. A `direct` kernel has its arguments first and its constants last; integers that may
    pass 2^31 are `tl.int64`.
    """
    return lambda function: Kernel(jit(function, direct), writes, direct)


class Tile(NamedTuple):
    """The part of the similarity matrix that one program computes at a time, and with how many warps."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1  # loads in flight of a pipelined loop

    def neighbours(self) -> list[Tile]:
        """The candidates of autotuning. Rows and columns stay: grids and block tables depend on them."""
        stages = sorted({max(1, self.stages - 1), self.stages, self.stages + 1})
        return [self._replace(warps=warps, stages=count) for warps in (1, 2, 4, 8) for count in stages]


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    tile: Tile,
    *arguments: Any,
    form: tuple[Any, ...] | None = None,
    **constants: Any,
) -> None:
    """Run a kernel: `arguments` in the order of its signature, then its constants; those of the tile are added here.

    `form` and the constants tell, for a direct kernel, which arguments are None and which element types the tensors
    have: launches that differ in any of these must differ in `form` or in a constant. A short `form` is found faster
    than the types of thirty arguments, which take its place where it is not given. The constants of one kernel are
    always given in the same order.
    """
    if triton is None:
        raise ImportError("backend 'triton' needs Triton: pip install triton, or use backend='torch'")
    if 0 in grid:
        return
    device = arguments[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tile, *arguments, form=form, **constants)
    recording = replay.current()
    if not kernel.direct or INTERPRETED or AUTOTUNED:
        if recording is not None:
            recording.add_call(_launch_by_triton, kernel, grid, tile, constants, *arguments)
        return _launch_by_triton(kernel, grid, tile, constants, *arguments)
    key = (device, tile, form or form_of(arguments), *constants.values())
    compiled = kernel.compiled.get(key)
    if compiled is None:
        compiled = kernel.compiled[key] = _compile(kernel, grid, tile, arguments, constants)
    values = [*arguments, *compiled.constants]
    for at in compiled.tensors:
        values[at] = arguments[at].data_ptr()
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if recording is not None:
        tensors = {at: arguments[at] for at in compiled.tensors}
        recording.add_start(partial(compiled.start, x, y, z), values, tensors)
    compiled.start(x, y, z, values)


def form_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The types of all arguments; of tensors, those of their elements."""
    return tuple(value.dtype if isinstance(value, torch.Tensor) else type(value) for value in arguments)


def _launch_by_triton(
    kernel: Kernel, grid: tuple[int, ...], tile: Tile, constants: dict[str, Any], *arguments: Any
) -> None:
    constants = constants | {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    if AUTOTUNED:
        absent = {name for name, value in zip(kernel.function.arg_names, arguments, strict=False) if value is None}
        _autotuned(kernel, tile, frozenset(absent))[grid](*arguments, **constants)
    else:
        kernel.function[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _compile(
    kernel: Kernel, grid: tuple[int, ...], tile: Tile, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Compiled:
    constants = constants | {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = kernel.function.warmup(*arguments, grid=grid, **constants, **options)
    tensors = tuple(at for at, value in enumerate(arguments) if isinstance(value, torch.Tensor))
    last = tuple(constants[name] for name in kernel.function.arg_names[len(arguments) :])
    run = compiled.run  # loads the kernel
    stream, device = triton.runtime.driver.active.get_current_stream, arguments[0].get_device()
    return Compiled(compiled, run, compiled.function, compiled.packed_metadata, stream, device, tensors, last)


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
