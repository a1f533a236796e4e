"""Compiles `product_statistics` as it is launched, for sm_90 and without a GPU; prints a JSON object for each launch.

The host functions run on CPU tensors, but each launch is replaced by a compilation with the arguments, switches and
tile of that launch. Must run without TRITON_INTERPRET.

    python product_statistics_aot_report.py bfloat16,3584 …     element type, width
"""

import json
import sys
from typing import Any

import torch

from gasp_fast.benchmarking.ahead_of_time import compile_for_hopper
from gasp_fast.kernels import product_statistics, rows_torch
from gasp_fast.kernels.chunk import ChunkMatches, Problem, TermDefinition
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.triton_launch import Kernel, Tile

LAYERS, FRAMES, FRAME, MATCHES = 2, 4, 576, 64


def compile_instead(kernel: Kernel, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    compiled = compile_for_hopper(kernel, tile, arguments, constants)
    report = {
        "kernel": kernel.function.__name__, "rows": tile.rows, "warps": tile.warps, "shared": compiled.shared,
        "registers": compiled.registers, "spill_bytes": compiled.spill_bytes,
        "wgmma": compiled.count("HGMMA"), "async_copies": compiled.count("LDGSTS"),
    }  # fmt: skip
    print(json.dumps(report), flush=True)


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
    for case in sys.argv[1:]:
        name, embedding_width = case.split(",")
        print(json.dumps({"case": case}))
        every_launch(getattr(torch, name), int(embedding_width))
