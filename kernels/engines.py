"""Backends and strategies: which ones exist, and how one is chosen.

| backend  | device           | strategy                                                                           |
| -------- | ---------------- | ---------------------------------------------------------------------------------- |
| `triton` | CUDA             | `narrow` where `narrow.eligible`: 16 bits up to D = 256; else `chunked`            |
| `cpp`    | CPU              | `chunked`                                                                          |
| `torch`  | any              | dense, by autograd (`gasp_fast.loss.dense`); no engine                             |

Under `TRITON_INTERPRET=1` the triton backend also accepts CPU tensors. That is slow; it serves to test the kernels
without a GPU. Only the dense backend computes in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import rows_cpp
from .chunk import FrameStatistics, FrameUpstream, MatchTerms, Problem, RowOperations, TermWeights
from .chunked import ChunkedEngine
from .index import MatchIndex

CPU_WORKSPACE = 24 << 20  # leaves room under 32 MiB for converted tokens and the library's own packing
GPU_WORKSPACE = 112 << 20  # leaves room under 128 MiB for statistics of a chunk
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "cpp", "torch")


class Engine(Protocol):
    """A strategy: computes terms, statistics and gradients. `chunked.ChunkedEngine` documents each argument."""

    def terms_and_gradients(
        self,
        problem: Problem,
        index: MatchIndex,
        weights: TermWeights | None,
        terms: MatchTerms,
        negatives: str,
        eps: float,
        gradient: Tensor | None,
        needs_temperature_gradient: bool,
    ) -> Tensor | None: ...

    def frame_match(self, problem: Problem) -> FrameStatistics: ...

    def frame_match_gradient(
        self,
        problem: Problem,
        statistics: FrameStatistics,
        upstream: FrameUpstream,
        gradient: Tensor | None,
        needs_temperature_gradient: bool,
    ) -> Tensor | None: ...


def triton_available() -> bool:
    from . import rows_triton

    return rows_triton.available()


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` stands for, or the given one if it supports this device and type."""
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if dtype not in FAST_DTYPES:
            return "torch"
        if device.type == "cuda" and triton_available():
            return "triton"
        return "cpp" if device.type == "cpu" and rows_cpp.available() else "torch"
    if backend == "torch":
        return backend
    if dtype not in FAST_DTYPES:
        raise ValueError(f"backend = {backend!r} does not take {dtype}; use backend='torch'")
    if backend == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend = 'cpp' works on CPU tensors, embeddings lie on {device}; use backend='triton'")
        if not rows_cpp.available():
            raise RuntimeError(f"backend = 'cpp' is not built ({rows_cpp.WHY_MISSING}); reinstall gasp_fast")
    if backend == "triton":
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"backend = 'triton' works on CUDA tensors, embeddings lie on {device}; use backend='cpp'")
        if not triton_available():
            raise RuntimeError("backend = 'triton' needs Triton; pip install triton, or use backend='torch'")
    return backend


def cpp_engine(embeddings: Tensor) -> Engine:
    return ChunkedEngine(operations=rows_cpp, workspace_bytes=CPU_WORKSPACE)


def triton_engine(embeddings: Tensor) -> Engine:
    from . import narrow, rows_cuda, rows_triton

    if narrow.eligible(embeddings):
        return narrow
    fused_pass = rows_cuda.fused_pass if rows_cuda.enabled() else None
    return ChunkedEngine(operations=rows_triton, workspace_bytes=GPU_WORKSPACE, fused_pass=fused_pass)


# Backend -> its engine for some embeddings [L, N, D]. Another engine can be registered here, with a smaller workspace
# or other row operations.
ENGINES: dict[str, Callable[[Tensor], Engine]] = {"cpp": cpp_engine, "triton": triton_engine}

if TYPE_CHECKING:  # mypy checks here that each module has all operations
    from . import narrow, rows_torch, rows_triton

    _operations: tuple[RowOperations, ...] = (rows_cpp, rows_torch, rows_triton)
    _engines: tuple[Engine, ...] = (narrow,)
