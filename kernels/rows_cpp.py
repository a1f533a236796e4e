"""The row operations on the CPU: the extension `csrc/rows.cpp` with the signatures of `rows_torch`.

Tensors are passed as NumPy views, without a copy; bfloat16, which NumPy lacks, as its 16 bits. One layer at a time
(`G = 1`): a CPU gains nothing from several layers in one call. The extension knows neither float16, which alone has a
factor, nor duals: norms and projections of these are computed by `rows_torch`. So are sums of statistics, which occur
only where columns are cut, and `gather_rows` and `add_rows`, where torch is as fast as memory.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rows_torch
from .chunk import (
    AddedRows,
    ChunkMatches,
    FrameStatistics,
    FrameUpstream,
    MatchTerms,
    PartMemory,
    RowChunk,
    TermWeights,
)
from .rows_torch import add_rows, gather_rows

__all__ = [
    "add_rows", "available", "fold", "frame_statistics", "gather_rows", "inverse_norms", "loss_terms",
    "norms_and_rows", "project_gradient", "similarity_gradient",
]  # fmt: skip

_rows: Any
try:
    _rows = importlib.import_module("gasp_fast._rows")
except ImportError as error:  # a source tree that was never built
    _rows, WHY_MISSING = None, str(error)
else:
    WHY_MISSING = ""


def available() -> bool:
    return _rows is not None


def inverse_norms(embeddings: Tensor, duals: Tensor | None = None) -> Tensor:
    if embeddings.dtype == torch.float16 or duals is not None:
        return rows_torch.inverse_norms(embeddings, duals)
    out = torch.empty(embeddings.shape[:-1], dtype=torch.float32)
    for layer, norms in zip(embeddings, out, strict=True):
        _rows.inverse_norms(_bits(_dense_rows(layer)), norms.numpy(), _threads())
    return out


def norms_and_rows(
    tokens: Tensor,
    duals: Tensor | None,
    own: Tensor,
    row_of: Tensor,
    norms: Tensor,
    of_rows: Tensor,
    anchors: Tensor | None,
) -> None:
    norms.copy_(inverse_norms(tokens, duals))
    torch.index_select(norms, 1, own, out=of_rows)
    if anchors is not None:
        gather_rows(tokens, own, anchors)


def frame_statistics(
    chunk: RowChunk,
    matches: ChunkMatches | None,
    previous: FrameStatistics | None,
    memory: PartMemory | None = None,
) -> FrameStatistics:
    cells = 1, chunk.row_token.shape[0], chunk.frame_offsets.shape[0] - 1
    lse = torch.empty(cells)
    ignored = matches is not None and matches.definition.ignores_targets
    found = FrameStatistics(
        lse=lse,
        known_lse=torch.empty(cells),
        expected=torch.empty(*cells, 0 if chunk.values is None else chunk.values.shape[1]),
        best=torch.empty(cells, dtype=torch.int64),
        peak=torch.empty(cells),
        negative_lse=torch.empty(cells) if ignored else lse,
    )
    _rows.frame_statistics(_chunk(chunk), _matches(matches), _statistics(found), _threads())
    return found if previous is None else rows_torch.merged(previous, found)


def loss_terms(
    statistics: FrameStatistics,
    matches: ChunkMatches,
    weights: TermWeights | None,
    terms: MatchTerms,
    memory: PartMemory | None = None,
) -> FrameUpstream | None:
    upstream = None
    if weights is not None:
        upstream = FrameUpstream(torch.empty_like(statistics.lse), torch.empty_like(statistics.expected))
    _rows.loss_terms(
        _statistics(statistics), _matches(matches),
        *(value[0].numpy() for value in terms),
        *((None, None) if weights is None else (scale[0].numpy() for scale in weights)),
        *((None, None) if upstream is None else (value[0].numpy() for value in upstream)),
        _threads(),
    )  # fmt: skip
    return upstream


def similarity_gradient(
    chunk: RowChunk,
    statistics: FrameStatistics,
    upstream: FrameUpstream,
    matches: ChunkMatches | None,
    out: Tensor,
) -> None:
    a, b = (value[0].numpy() for value in upstream)
    _rows.similarity_gradient(
        _chunk(chunk), _statistics(statistics), a, b, _matches(matches), _bits(out[0]), _threads()
    )  # fmt: skip


def fold(x: Tensor, own: Tensor, row_of: Tensor, others: Tensor, rest: Tensor) -> None:
    if x.dtype == torch.float16:
        rows_torch.fold(x, own, row_of, others, rest)
        return
    for layer, left in zip(x, rest, strict=True):
        _rows.fold(_bits(layer), own.numpy(), others.numpy(), _bits(left), _threads())


def project_gradient(
    gradient: Tensor,
    embeddings: Tensor,
    inverse_norm: Tensor,
    out: Tensor,
    of_unit: bool,
    factor: Tensor | None = None,
    added: AddedRows | None = None,
    tokens: Tensor | None = None,
    duals: Tensor | None = None,
) -> None:
    if factor is not None or duals is not None or torch.float16 in (embeddings.dtype, out.dtype):
        rows_torch.project_gradient(gradient, embeddings, inverse_norm, out, of_unit, factor, added, tokens, duals)
        return
    place = None if tokens is None else tokens.numpy()
    of_token = None if added is None else added.of_token.numpy() - added.first_row
    rows = [None] * len(gradient) if added is None else [layer.numpy() for layer in added.rows]
    layers = zip(gradient, _dense_rows(embeddings), inverse_norm, out, rows, strict=True)
    for u, layer, norms, to, of_layer in layers:
        _rows.project_gradient(
            u.numpy(), _bits(layer), norms.numpy(), _bits(to), of_unit, of_layer, of_token, place, _threads()
        )  # fmt: skip


def _chunk(chunk: RowChunk) -> object:
    return _rows.Chunk(
        chunk.similarity[0].numpy(),
        chunk.row_scale[0].numpy(),
        chunk.token_scale[0].numpy(),
        float(chunk.temperature),
        chunk.row_token.numpy(),
        chunk.exclude_own,
        chunk.first_token,
        chunk.frame_offsets.numpy(),
        chunk.first_column,
        None if chunk.values is None else chunk.values.numpy(),
        None if chunk.known is None else chunk.known.numpy(),
    )


def _matches(matches: ChunkMatches | None) -> object:
    if matches is None:
        return None
    definition = matches.definition
    return _rows.Matches(
        matches.start.numpy(),
        matches.longest,
        matches.order.numpy(),
        matches.target.numpy(),
        matches.depth.numpy(),
        matches.has_depth.numpy(),
        matches.positive[0].numpy(),
        None if matches.pull is None else matches.pull[0].numpy(),
        definition.every_frame,
        definition.ignores_targets,
        definition.eps,
    )


def _statistics(statistics: FrameStatistics) -> object:
    return _rows.Statistics(*(value[0].numpy() for value in statistics))


def _bits(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _dense_rows(embeddings: Tensor) -> Tensor:
    """Rows may have any stride; the numbers of a row must be contiguous."""
    return embeddings if embeddings.stride(-1) == 1 else embeddings.contiguous()


def _threads() -> int:
    return torch.get_num_threads()
