"""Statistics, terms and gradient of a chunk in one CUDA kernel: `csrc/fused_rows.cu` behind a plain C interface.

It replaces three of the row operations where a whole row of similarities fits a multiprocessor's shared memory
(about 57,000 tokens on Hopper), reading the chunk once instead of twice. Built only where nvcc and a CUDA torch are
at hand. Not yet measured on a GPU, so it is asked for by `GASP_FAST_CUDA_ROWS=1` and never chosen by itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .chunk import MatchRuns, MatchScales, MatchTerms, RowChunk

LIBRARY = Path(__file__).parent.parent / "libgasp_fused_rows.so"  # beside the other extensions
SHARED_BYTES = 227 << 10  # per block on sm_90
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def enabled() -> bool:
    return os.environ.get("GASP_FAST_CUDA_ROWS") == "1" and library() is not None


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL | None:
    """The compiled kernel, or None where it was not built."""
    where = path or LIBRARY
    if not where.exists():
        return None
    loaded = ctypes.CDLL(str(where))
    pointer, size, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    loaded.gasp_fused_rows_bytes.restype = size
    loaded.gasp_fused_rows_bytes.argtypes = [size, size]
    loaded.gasp_fused_rows.restype = flag
    loaded.gasp_fused_rows.argtypes = [
        *[pointer] * 8,  # chunk
        *[size] * 5,
        *[pointer] * 5,  # runs
        *[size] * 2,
        *[pointer] * 4,  # terms
        size,
        *[pointer] * 2,  # scales
        *[size] * 2,
        flag,
        number,
        pointer,
        flag,
        pointer,
    ]
    return loaded


def fused_pass(
    chunk: RowChunk,
    runs: MatchRuns,
    scales: MatchScales | None,
    terms: MatchTerms,
    sequence_negatives: bool,
    eps: float,
    x: Tensor | None,
) -> bool:
    """`frame_statistics`, `match_terms` and `similarity_gradient` at once; False if the row does not fit."""
    kernel = library()
    layers, rows, tokens = chunk.similarity.shape
    frames = chunk.frame_offsets.shape[0] - 1
    if kernel is None or chunk.values is None or chunk.known is None or not chunk.exclude_own:
        return False
    if kernel.gasp_fused_rows_bytes(tokens, frames) > SHARED_BYTES:
        return False
    row_scale = chunk.row_scale.contiguous()
    values = chunk.values[:, 0].contiguous()
    corr, depth = (None, None) if scales is None else _same_strides(scales)
    device = chunk.similarity.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    status = kernel.gasp_fused_rows(
        chunk.similarity.data_ptr(), row_scale.data_ptr(), chunk.token_scale.data_ptr(), chunk.temperature.data_ptr(),
        chunk.own_token.data_ptr(), chunk.frame_offsets.data_ptr(), values.data_ptr(), chunk.known.data_ptr(),
        layers, rows, tokens, frames, chunk.token_scale.stride(0),
        runs.start.data_ptr(), runs.order.data_ptr(), runs.target.data_ptr(), runs.depth.data_ptr(),
        runs.counts.data_ptr(), runs.longest, runs.first_token,
        terms.corr.data_ptr(), terms.depth.data_ptr(), terms.best.data_ptr(), terms.confidence.data_ptr(),
        terms.corr.stride(0),
        None if corr is None else corr.data_ptr(), None if depth is None else depth.data_ptr(),
        0 if corr is None else corr.stride(0), 0 if corr is None else corr.stride(1),
        int(sequence_negatives), eps,
        None if x is None else x.data_ptr(), _ELEMENTS[torch.float32 if x is None else x.dtype], stream,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"gasp_fused_rows failed with CUDA error {status}; unset GASP_FAST_CUDA_ROWS to do without")
    return True


def _same_strides(scales: MatchScales) -> tuple[Tensor, Tensor]:
    if scales.corr.stride() == scales.depth.stride():
        return scales.corr, scales.depth
    return scales.corr.contiguous(), scales.depth.contiguous()
