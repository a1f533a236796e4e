"""Compiles a Triton kernel for Hopper as it is launched, without a GPU: registers, spills, and the disassembled code.

Arguments may be on the CPU or without memory; their types count, not their numbers. Triton must not run in its
interpreter.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gasp_fast.kernels.triton_launch import Kernel, Tile

TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
CAPABILITY = 90
WARP = 32


@dataclass(frozen=True)
class HopperCode:
    registers: int  # a thread
    spill_bytes: int
    shared: int  # bytes a program
    code: tuple[tuple[int, str], ...]  # address and instruction

    def count(self, instruction: str) -> int:
        return sum(instruction in text for _, text in self.code)


def compile_for_hopper(kernel: Kernel, tile: Tile, arguments: tuple[Any, ...], constants: dict[str, Any]) -> HopperCode:
    """The code of a launch with these arguments; compiled once for each kind of launch."""
    constants = constants | {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    kinds = tuple(map(_kind, arguments))
    return _compiled(kernel.function, tile.warps, tile.stages, kinds, tuple(sorted(constants.items())))


@functools.cache
def _compiled(function: Any, warps: int, stages: int, kinds: tuple[Any, ...], constants: tuple[Any, ...]) -> HopperCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = _signature(function, kinds, dict(constants))
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, WARP), options=options)
    log, code = _assembled(compiled.asm["ptx"], compiled.asm["cubin"])
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return HopperCode(int(registers[1]), spills, compiled.metadata.shared, code)


def _kind(value: Any) -> tuple[str, Any, bool]:
    """(type in a signature, value where it decides what is compiled, whether 16 divides it)."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype], None, True  # as memory comes from the allocator
    if value is None or isinstance(value, bool):
        return "constexpr", value, False
    if isinstance(value, int):
        return ("i32" if abs(value) < 2**31 else "i64"), (1 if value == 1 else 0), value % 16 == 0
    return "fp32", 0.0, False


def _signature(
    function: Any, kinds: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and divisibility of the parameters, as Triton finds them at a launch."""
    given = dict(zip((parameter.name for parameter in function.params), kinds, strict=False))
    given |= {name: ("constexpr", value, False) for name, value in constants.items() if name in function.arg_names}
    missing = [parameter.name for parameter in function.params if parameter.name not in given]
    if missing:
        raise ValueError(f"{function.__name__}: the launch has no value for {', '.join(missing)}")
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for at, parameter in enumerate(function.params):
        kind, value, divisible = given[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or kind == "constexpr" or (kind == "i32" and value == 1 and specialised):
            signature[parameter.name], constexprs[(at,)] = "constexpr", value
            continue
        signature[parameter.name] = parameter.annotation_type or kind
        if divisible and specialised:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def _assembled(ptx: str, cubin: bytes) -> tuple[str, tuple[tuple[int, str], ...]]:
    """The log of Triton's own assembler, and the disassembled code without padding."""
    from triton import knobs

    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(ptx)
        binary.write_bytes(cubin)
        assembler = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture[1]}", text, "-o", Path(folder, "again")]
        log = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
        listing = [knobs.nvidia.cuobjdump.path, "-sass", binary]
        sass = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    lines = re.finditer(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.MULTILINE)
    return log, tuple((int(line[1], 16), line[2]) for line in lines if "NOP" not in line[2])
