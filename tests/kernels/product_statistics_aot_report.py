"""Compiles `product_statistics` as it is launched, for sm_90 and without a GPU; prints a JSON object for each launch.

The host functions run on CPU tensors, but each launch is replaced by a compilation with the arguments, switches and
tile of that launch. Must run without TRITON_INTERPRET.

    python product_statistics_aot_report.py bfloat16,3584
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

from gasp_fast.kernels import product_statistics, rows_torch
from gasp_fast.kernels.chunk import ChunkMatches, Problem, TermDefinition
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.triton_launch import Kernel, Tile

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
ARCH = 90
LAYERS, FRAMES, FRAME, MATCHES = 2, 4, 576, 64


def compile_instead(kernel: Kernel, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    parameters = kernel.function.params
    named = dict(zip((parameter.name for parameter in parameters), arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for at, parameter in enumerate(parameters):
        value, specialised = named[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialised):
            signature[parameter.name], constexprs[(at,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]  # what the allocator gives
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and specialised:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    report = {"kernel": kernel.function.__name__, "rows": tile.rows, "columns": tile.columns, "warps": tile.warps}
    report |= {name: constants[name] for name in ("VALUES", "EVERY_FRAME") if name in constants}
    report |= {"ignored": named["negative_lse"] is not None, "shared": compiled.metadata.shared}
    print(json.dumps(report | resources(compiled.asm["ptx"], compiled.asm["cubin"])), flush=True)


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


def every_launch(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = FRAMES * FRAME
    index = MatchIndex.build(
        frame_offsets=torch.arange(FRAMES + 1) * FRAME,
        sequence_offsets=torch.tensor([0, FRAMES]),
        anchor=torch.randint(FRAME, (MATCHES,), generator=generator),
        target=torch.randint(FRAME, tokens, (MATCHES,), generator=generator),
        target_depth=torch.ones(MATCHES),
        countable=torch.ones(MATCHES, dtype=torch.bool),
        patch_depth=torch.ones(tokens),
        known=torch.ones(tokens, dtype=torch.bool),
        weight=None,
    )
    embeddings, temperature = torch.zeros(LAYERS, tokens, width, dtype=dtype), torch.tensor(0.07)
    rows = slice(0, index.rows.row_token.shape[0])
    for negatives in ("sequence", "frame"):
        own = negatives == "sequence"
        problem = Problem(embeddings, embeddings, index.rows, temperature, index.values, index.known, own)
        for other_targets in ("negatives", "ignored"):
            definition = TermDefinition(negatives, other_targets, 1e-6)
            matches = ChunkMatches.of(index, rows, torch.zeros(LAYERS, MATCHES), None, definition)
            product_statistics.frame_statistics(problem, matches)
    for values in (None, index.values, torch.zeros(tokens, 3)):
        known = None if values is None else index.known
        problem = Problem(embeddings, embeddings, index.rows, temperature, values, known, exclude_own=True)
        product_statistics.frame_match(problem)


if __name__ == "__main__":
    product_statistics.launch = compile_instead  # type: ignore[assignment]
    product_statistics.inverse_norms = rows_torch.inverse_norms  # type: ignore[assignment]
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # IEEE float32 has no tensor core
    name, embedding_width = sys.argv[1].split(",")
    every_launch(getattr(torch, name), int(embedding_width))
