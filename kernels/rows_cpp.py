"""The row operations on the CPU: the extension `csrc/rows.cpp` with the signatures of `rows_torch`.

Tensors are passed as NumPy views, without a copy; bfloat16, which NumPy lacks, as its 16 bits. One layer at a time
(`G = 1`): a CPU gains nothing from several layers in one call. The extension does not know float16: norms and
projections of float16 embeddings are computed by `rows_torch`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rows_torch
from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchTerms, RowChunk, TermWeights

_rows: Any
try:
    _rows = importlib.import_module("gasp_fast._rows")
except ImportError as error:  # a source tree that was never built
    _rows, WHY_MISSING = None, str(error)
else:
    WHY_MISSING = ""


def available() -> bool:
    return _rows is not None


def inverse_norms(embeddings: Tensor) -> Tensor:
    if embeddings.dtype == torch.float16:
        return rows_torch.inverse_norms(embeddings)
    out = torch.empty(embeddings.shape[:-1], dtype=torch.float32)
    for layer, norms in zip(_dense_rows(embeddings), out, strict=True):
        _rows.inverse_norms(_bits(layer), norms.numpy(), _threads())
    return out


def frame_statistics(chunk: RowChunk, runs: MatchRuns | None, every_frame: bool) -> FrameStatistics:
    rows, frames = chunk.own_token.shape[0], chunk.frame_offsets.shape[0] - 1
    width = 0 if chunk.values is None else chunk.values.shape[1]
    out = FrameStatistics(
        lse=torch.empty(1, rows, frames),
        known_lse=torch.empty(1, rows, frames),
        expected=torch.empty(1, rows, frames, width),
        best=torch.empty(1, rows, frames, dtype=torch.int64),
        peak=torch.empty(1, rows, frames),
    )
    start, longest = (None, 0) if runs is None else (runs.start.numpy(), runs.longest)
    _rows.frame_statistics(_chunk(chunk), start, longest, every_frame, *(value[0].numpy() for value in out), _threads())
    return out


def loss_terms(
    chunk: RowChunk,
    statistics: FrameStatistics,
    runs: MatchRuns,
    weights: TermWeights | None,
    terms: MatchTerms,
    negatives: str,
    eps: float,
) -> FrameUpstream | None:
    upstream = None
    if weights is not None:
        upstream = FrameUpstream(torch.empty_like(statistics.lse), torch.empty_like(statistics.expected))
    _rows.loss_terms(
        _chunk(chunk),
        *(value[0].numpy() for value in statistics),
        runs.start.numpy(), runs.longest, runs.order.numpy(), runs.target.numpy(), runs.depth.numpy(),
        runs.has_depth.numpy(), runs.first_token,
        *(value[0].numpy() for value in terms),
        *((None, None) if weights is None else (scale[0].numpy() for scale in weights)),
        negatives == "sequence", eps,
        *((None, None) if upstream is None else (value[0].numpy() for value in upstream)),
        _threads(),
    )  # fmt: skip
    return upstream


def similarity_gradient(
    chunk: RowChunk,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    runs: MatchRuns | None,
    weights: TermWeights | None,
    out: Tensor,
) -> None:
    _rows.similarity_gradient(
        _chunk(chunk),
        *(value[0].numpy() for value in statistics[:3]),
        *(value[0].numpy() for value in upstream),
        *((None, 0, None, None, 0) if runs is None else (
            runs.start.numpy(), runs.longest, runs.order.numpy(), runs.target.numpy(), runs.first_token)),
        None if weights is None else weights.corr[0].numpy(),
        _bits(out[0]),
        _threads(),
    )  # fmt: skip


def project_gradient(gradient: Tensor, embeddings: Tensor, inverse_norm: Tensor, out: Tensor) -> None:
    if embeddings.dtype == torch.float16:
        rows_torch.project_gradient(gradient, embeddings, inverse_norm, out)
        return
    layers = zip(gradient, _dense_rows(embeddings), inverse_norm, out, strict=True)
    for u, layer, norms, to in layers:
        _rows.project_gradient(u.numpy(), _bits(layer), norms.numpy(), _bits(to), _threads())


def _chunk(chunk: RowChunk) -> object:
    return _rows.Chunk(
        chunk.similarity[0].numpy(),
        chunk.row_scale[0].numpy(),
        chunk.token_scale[0].numpy(),
        float(chunk.temperature),
        chunk.own_token.numpy(),
        chunk.exclude_own,
        chunk.frame_offsets.numpy(),
        None if chunk.values is None else chunk.values.numpy(),
        None if chunk.known is None else chunk.known.numpy(),
    )


def _bits(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _dense_rows(embeddings: Tensor) -> Tensor:
    """Rows may have any stride; the numbers of a row must be contiguous."""
    return embeddings if embeddings.stride(-1) == 1 else embeddings.contiguous()


def _threads() -> int:
    return torch.get_num_threads()
