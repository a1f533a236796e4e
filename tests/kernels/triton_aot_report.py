"""Compiles the kernels that the Triton backend launches, for sm_90 and without a GPU; prints a JSON object for each.

The host functions run on CPU tensors of real shapes, but each launch is replaced by a compilation with exactly the
arguments, switches and tile of that launch. Registers and spills are those that Triton's own `ptxas` reports,
instructions those in its disassembly. Must run without TRITON_INTERPRET.

    python triton_aot_report.py narrow,bfloat16,256
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gasp_fast.kernels import narrow, narrow_triton, rows_triton
from gasp_fast.kernels.chunk import MatchRuns, MatchTerms, Problem, RowChunk, TermWeights
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.triton_launch import Kernel, Tile

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip
ARCH = 90


def compile_instead(kernel: Kernel, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    parameters = kernel.function.params
    constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    named = dict(zip((parameter.name for parameter in parameters), arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for at, parameter in enumerate(parameters):
        value = named[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialised):
            signature[parameter.name], constexprs[(at,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]  # what the allocator gives
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and specialised:
                attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    report = {"kernel": kernel.function.__name__, "shared": compiled.metadata.shared}
    report |= {"warps": tile.warps, "rows": tile.rows, "columns": tile.columns, "stages": tile.stages}
    report |= resources(compiled.asm["ptx"], compiled.asm["cubin"])
    print(json.dumps(report), flush=True)


def resources(ptx: str, cubin: bytes) -> dict[str, int]:
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(ptx)
        binary.write_bytes(cubin)
        assembler = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", text, "-o", Path(folder, "again")]
        log = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
        listing = [knobs.nvidia.cuobjdump.path, "-sass", binary]
        sass = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "wgmma": sass.count("HGMMA"),
        "async_copies": sass.count("LDGSTS"),
    }


def problem(frames: int, per_frame: int, matches: int) -> MatchIndex:
    generator = torch.Generator().manual_seed(0)
    tokens = frames * per_frame
    return MatchIndex.build(
        frame_offsets=torch.arange(frames + 1) * per_frame,
        sequence_offsets=torch.tensor([0, frames]),
        anchor=torch.randint(per_frame, (matches,), generator=generator),
        target=torch.randint(per_frame, tokens, (matches,), generator=generator),
        target_depth=torch.ones(matches),
        countable=torch.ones(matches, dtype=torch.bool),
        patch_depth=torch.ones(tokens),
        known=torch.ones(tokens, dtype=torch.bool),
    )


def wide(dtype: torch.dtype, width: int) -> None:
    index = problem(frames=16, per_frame=144, matches=256)
    rows, tokens = 64, len(index.known)
    embeddings = torch.zeros(1, tokens, width, dtype=dtype)
    own = index.rows.row_token[:rows]
    scale = rows_triton.inverse_norms(embeddings)
    chunk = RowChunk(
        similarity=torch.zeros(1, rows, tokens), row_scale=scale[:, own], token_scale=scale,
        temperature=torch.tensor(0.07), own_token=own, exclude_own=True, frame_offsets=index.rows.frame_offsets,
        values=index.values, known=index.known,
    )  # fmt: skip
    runs = MatchRuns.of(index)
    weights = TermWeights(*(torch.ones(1, 1).expand(1, 256) for _ in range(2)))
    terms = MatchTerms.empty(1, 256, torch.device("cpu"))
    for every_frame in (False, True):
        statistics = rows_triton.frame_statistics(chunk, runs, every_frame)
        negatives = "sequence" if every_frame else "frame"
        wanted = weights if every_frame else None
        upstream = rows_triton.loss_terms(chunk, statistics, runs, wanted, terms, negatives, 1e-6)
    x = torch.zeros(1, rows, tokens, dtype=dtype)
    rows_triton.similarity_gradient(chunk, statistics, upstream, runs, weights, x)
    rows_triton.frame_statistics(chunk, None, True)
    rows_triton.similarity_gradient(chunk, statistics, upstream, None, None, x)
    rows_triton.project_gradient(torch.zeros(1, tokens, width), embeddings, scale, torch.empty_like(embeddings))


def streamed(dtype: torch.dtype, width: int) -> None:
    index = problem(frames=24, per_frame=576, matches=256)
    embeddings = torch.zeros(2, len(index.known), width, dtype=dtype)
    weights = TermWeights(*(torch.ones(1, 1).expand(2, 256) for _ in range(2)))
    terms = MatchTerms.empty(2, 256, torch.device("cpu"))
    rest = ("sequence", 1e-6, torch.empty_like(embeddings), True)
    posed = Problem.of_loss(embeddings, index, torch.tensor(0.07))
    narrow.terms_and_gradients(posed, index, weights, terms, *rest)


if __name__ == "__main__":
    rows_triton.launch = narrow_triton.launch = compile_instead  # type: ignore[assignment]
    strategy, name, width = sys.argv[1].split(",")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # what makes float32 eligible for the narrow strategy
    {"wide": wide, "narrow": streamed}[strategy](getattr(torch, name), int(width))
