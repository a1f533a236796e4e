"""Compiles the kernels of the Triton row operations for sm_90, without a GPU; prints a JSON object for each.

The host functions run on CPU tensors of real shapes, but each launch is replaced by a compilation with exactly the
arguments, constants and tile of that launch. Registers and spills are those that Triton's own `ptxas` reports,
instructions those in its disassembly. Must run without TRITON_INTERPRET.

    python triton_aot_report.py bfloat16,3584,256     element type, width, tokens of a frame
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gasp_fast.kernels import rows_triton
from gasp_fast.kernels.chunk import ChunkMatches, MatchTerms, RowChunk, TermDefinition, TermWeights
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.triton_launch import Kernel, Tile

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip
ARCH = 90


def compile_instead(kernel: Kernel, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    assert kernel.direct  # no address or number is compiled in
    constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    parameters = kernel.function.params
    named = dict(zip((parameter.name for parameter in parameters), arguments, strict=False)) | constants
    signature, constexprs = {}, {}
    for at, parameter in enumerate(parameters):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constexprs[(at,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = parameter.annotation_type or ("i32" if isinstance(value, int) else "fp32")
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constexprs)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    report = {"kernel": kernel.function.__name__, "shared": compiled.metadata.shared, "warps": tile.warps}
    report |= {"rows": tile.rows, "columns": tile.columns, "align": constants.get("ALIGN")}
    elements = tile.rows * tile.columns // (32 * tile.warps)  # of a lane
    report |= resources(compiled.asm["ptx"], compiled.asm["cubin"], elements)
    print(json.dumps(report), flush=True)


def resources(ptx: str, cubin: bytes, elements: int) -> dict[str, Any]:
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
        "loads": dict(Counter(re.findall(r"\bLDG\.E[.\w]*", sass))),
        "instructions_per_element": bounded_loop(sass, elements),
    }


def bounded_loop(sass: str, elements: int) -> float | None:
    """Instructions for each element of the loop that takes exactly one exponential for it, if there is one."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    for end, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) > end:
            continue
        body = [inside for at, inside in code if int(target[1], 16) <= at <= end]
        if sum("MUFU.EX2" in inside for inside in body) == elements:
            return round(len(body) / elements, 2)
    return None


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
        weight=None,
    )


def every_launch(dtype: torch.dtype, width: int, per_frame: int) -> None:
    index = problem(frames=16, per_frame=per_frame, matches=256)
    rows, tokens = 64, len(index.known)
    embeddings = torch.zeros(1, tokens, width, dtype=dtype)
    own = index.rows.row_token[:rows]
    scale = rows_triton.inverse_norms(embeddings)
    chunk = RowChunk(
        similarity=torch.zeros(1, rows, tokens), row_scale=scale[:, own], token_scale=scale,
        temperature=torch.tensor(0.07), own_column=own, exclude_own=True, frame_offsets=index.rows.column_offsets,
        first_token=0, values=index.values, known=index.known, multiple=per_frame & -per_frame,
    )  # fmt: skip
    weights = TermWeights(*(torch.ones(1, 1).expand(1, 256) for _ in range(2)))
    terms = MatchTerms.empty(1, 256, torch.device("cpu"))
    x = torch.zeros(1, rows, tokens, dtype=dtype)
    for negatives, other_targets in (("sequence", "negatives"), ("frame", "ignored")):
        positive, pull = torch.empty(1, 256), torch.empty(1, 256)
        definition = TermDefinition(negatives, other_targets, 1e-6)
        matches = ChunkMatches.of(index, slice(0, rows), positive, pull, definition)
        statistics = rows_triton.frame_statistics(chunk, matches, None)
        rows_triton.frame_statistics(chunk, matches, statistics)
        rows_triton.loss_terms(statistics, matches, None, terms)
        upstream = rows_triton.loss_terms(statistics, matches, weights, terms)
        rows_triton.similarity_gradient(chunk, statistics, upstream, matches, x)
    statistics = rows_triton.frame_statistics(chunk, None, None)
    rows_triton.similarity_gradient(chunk, statistics, upstream, None, x)
    gradient = torch.zeros(1, tokens, width)
    rows_triton.add_rows(torch.zeros(1, rows, width), own, gradient)
    rows_triton.gather_rows(embeddings, own, torch.zeros(1, rows, width, dtype=dtype))
    rows_triton.project_gradient(gradient, embeddings, scale, torch.empty_like(embeddings), of_unit=False)


if __name__ == "__main__":
    rows_triton.launch = compile_instead  # type: ignore[assignment]
    name, width, per_frame = sys.argv[1].split(",")
    every_launch(getattr(torch, name), int(width), int(per_frame))
