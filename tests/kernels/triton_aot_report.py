"""Compiles the kernels of the Triton row operations for sm_90, without a GPU; prints a JSON object for each.

The host functions run on CPU tensors of real shapes, but each launch is replaced by a compilation with exactly the
arguments, constants and tile of that launch. Must run without TRITON_INTERPRET.

    python triton_aot_report.py bfloat16,3584,256 …     element type, width, tokens of a frame
"""

import json
import re
import sys
from typing import Any

import torch

from gasp_fast.benchmarking.ahead_of_time import WARP, HopperCode, compile_for_hopper
from gasp_fast.kernels import match_means, rows_triton, scaling, surfaces
from gasp_fast.kernels.chunk import AddedRows, ChunkMatches, MatchTerms, RowChunk, TermDefinition, TermWeights
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.triton_launch import Kernel, Tile


def compile_instead(kernel: Kernel, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    assert kernel.direct  # no address or number is compiled in
    constants.pop("form", None)
    compiled = compile_for_hopper(kernel, tile, arguments, constants)
    report = {
        "kernel": kernel.function.__name__, "align": constants.get("ALIGN"), "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "instructions_per_element": bounded_loop(compiled, tile.rows * tile.columns // (WARP * tile.warps)),
    }  # fmt: skip
    print(json.dumps(report), flush=True)


def bounded_loop(compiled: HopperCode, elements: int) -> float | None:
    """Instructions for each element of the loop that takes one exponential for it, if there is one.

    The assembler may compute some exponentials again to save registers; the other loops take two for each element.
    """
    for end, text in compiled.code if elements else ():
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) > end:
            continue
        body = [inside for at, inside in compiled.code if int(target[1], 16) <= at <= end]
        if elements <= sum("MUFU.EX2" in inside for inside in body) < 1.5 * elements:
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
    anchors, of_rows = (
        embeddings.new_empty(1, len(index.rows.row_token), width),
        torch.empty(1, len(index.rows.row_token)),
    )
    for duals in (None, None if dtype == torch.float16 else torch.zeros_like(embeddings)):
        own, row_of = index.rows.row_token, index.rows.token_row
        rows_triton.norms_and_rows(embeddings, duals, own, row_of, torch.empty(1, tokens), of_rows, anchors)
    chunk = RowChunk(
        similarity=torch.zeros(1, rows, tokens), row_scale=scale[:, own], token_scale=scale,
        temperature=torch.tensor(0.07), row_token=own, exclude_own=True, first_token=0,
        frame_offsets=index.rows.column_offsets, first_column=0, values=index.values, known=index.known,
        multiple=per_frame & -per_frame,
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
    others = index.rows.other_column
    rows_triton.fold(x, own, index.rows.token_row, others, torch.zeros(1, rows, len(others), dtype=dtype))
    gradient = torch.zeros(1, tokens, width)
    rows_triton.project_gradient(gradient[:, own], embeddings, scale, torch.empty_like(embeddings), False, tokens=own)
    rows_triton.add_rows(torch.zeros(1, rows, width), own, gradient)
    rows_triton.gather_rows(embeddings, own, torch.zeros(1, rows, width, dtype=dtype))
    added = AddedRows(torch.zeros(1, rows, width), index.rows.token_row, 0)
    for factor, sums in ((None, None), (None, added), (torch.ones(1), added)):
        rows_triton.project_gradient(gradient, embeddings, scale, torch.empty_like(embeddings), False, factor, sums)
    duals = embeddings if dtype == torch.float16 else torch.zeros_like(embeddings)  # float16 has none
    rows_triton.inverse_norms(embeddings, duals)
    for only, sums in ((own, None), (None, added)):
        part = gradient[:, :rows] if only is not None else gradient
        rows_triton.project_gradient(
            part, embeddings, scale, torch.empty_like(embeddings), False, None, sums, only, duals
        )
    shares, places = (index.corr_share, index.depth_share), torch.zeros(tokens, 2, dtype=torch.int64)
    for xy in (None, places):
        match_means.match_means(terms, index.target, shares, xy, xy, 2)
    points = [torch.zeros(1, 2, 8, 9, 3) for _ in range(4)]
    given = surfaces.Surfaces(
        *points, torch.zeros(1, 2, 8, 9), torch.zeros(1, 2, 7, 8, dtype=torch.uint8), *(torch.ones(1) for _ in range(3))
    )
    for backward in (False, True):
        surfaces.surface_terms(given, backward)
    scaling.place_scaled(embeddings[0, :rows], torch.tensor(2.0), own, torch.zeros_like(embeddings[0]))


if __name__ == "__main__":
    for module in (rows_triton, match_means, scaling, surfaces):
        module.launch = compile_instead  # type: ignore[attr-defined]
    scaling.INTERPRETED = surfaces.INTERPRETED = True  # tensors of the CPU count as those of a GPU
    for case in sys.argv[1:]:
        name, width, per_frame = case.split(",")
        print(json.dumps({"case": case}))
        every_launch(getattr(torch, name), int(width), int(per_frame))
