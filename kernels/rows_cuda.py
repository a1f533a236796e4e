"""Statistics, terms and gradient of a chunk in one CUDA kernel: `csrc/fused_rows.cu` behind a plain C interface.

It replaces three of the row operations where a whole row of similarities fits a multiprocessor's shared memory
(about 57,000 tokens on Hopper), and reads the chunk once instead of twice. Built only where nvcc and a CUDA torch are
installed. It has not been measured on a GPU yet, so it is off unless `GASP_FAST_CUDA_ROWS=1`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .chunk import MatchRuns, MatchTerms, RowChunk, TermWeights

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
        *[pointer] * 2,  # weights
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
    weights: TermWeights | None,
    terms: MatchTerms,
    negatives: str,
    eps: float,
    x: Tensor | None,
) -> bool:
    """`frame_statistics`, `loss_terms` and `similarity_gradient` in one launch; False if the row does not fit."""
    kernel = library()
    layers, rows, tokens = chunk.similarity.shape
    frames = chunk.frame_offsets.shape[0] - 1
    if kernel is None or chunk.values is None or chunk.known is None or not chunk.exclude_own:
        return False
    if kernel.gasp_fused_rows_bytes(tokens, frames) > SHARED_BYTES:
        return False
    row_scale = chunk.row_scale.contiguous()
    values = chunk.values[:, 0].contiguous()
    corr, depth = (None, None) if weights is None else _same_strides(weights)
    device = chunk.similarity.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    status = kernel.gasp_fused_rows(
        *_pointers(chunk.similarity, row_scale, chunk.token_scale, chunk.temperature),
        *_pointers(chunk.own_token, chunk.frame_offsets, values, chunk.known),
        layers, rows, tokens, frames, chunk.token_scale.stride(0),
        *_pointers(runs.start, runs.order, runs.target, runs.depth, runs.has_depth), runs.longest, runs.first_token,
        *_pointers(*terms), terms.corr.stride(0),
        *_pointers(corr, depth), *((0, 0) if corr is None else corr.stride()),
        int(negatives == "sequence"), eps,
        *_pointers(x), _ELEMENTS[torch.float32 if x is None else x.dtype], stream,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"gasp_fused_rows failed with CUDA error {status}; unset GASP_FAST_CUDA_ROWS to use Triton")
    return True


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _same_strides(weights: TermWeights) -> tuple[Tensor, Tensor]:
    if weights.corr.stride() == weights.depth.stride():
        return weights.corr, weights.depth
    return weights.corr.contiguous(), weights.depth.contiguous()
